"""What holds the house together: packaging, import directions, and importing without side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"fastdlp": "fastdlp", "fastdlp.kernels": "kernels", "fastdlp.cli": "cli", "fastdlp.bench": "bench"}
HEAVY = {"torch", "triton", "open_clip", "torchvision", "sklearn", "matplotlib", "transformers", "peft"}


def sources() -> dict[str, Path]:
    """Every module of the distribution by its import name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules and names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_package_list_equals_the_folders() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {name.rpartition(".")[0] or name for name in sources() if name.count(".")} | {"fastdlp"}
    assert set(setup["packages"]) == expected
    assert setup["package-dir"] == FOLDERS


def test_nobody_imports_the_bare_names() -> None:
    for name, path in sources().items():
        assert not {"kernels", "bench", "cli"} & {i.partition(".")[0] for i in imports(path)}, name


@pytest.mark.parametrize(
    ("module", "never"),
    [
        *((f"fastdlp.kernels.{path.stem}", ["fastdlp"]) for path in sorted((ROOT / "kernels").glob("*.py"))),
        ("fastdlp.config", ["fastdlp.", *HEAVY]),
        (
            "fastdlp.engine",
            ["fastdlp.methods.feddlp", "fastdlp.methods.METHODS", "fastdlp.data", "fastdlp.config", "fastdlp.cli"],
        ),
        ("fastdlp.methods.feddlp", ["fastdlp.kernels", "fastdlp.engine", "fastdlp.bank"]),
        ("fastdlp.methods.single", ["fastdlp.kernels", "fastdlp.engine", "fastdlp.bank"]),
        ("fastdlp.tower", ["fastdlp.engine", "fastdlp.methods", "fastdlp.task", "open_clip"]),
        ("fastdlp.task", ["fastdlp.engine", "fastdlp.methods", "fastdlp.data", "open_clip"]),
    ],
)
def test_imports_point_downward(module: str, never: list[str]) -> None:
    within = module.rpartition(".")[0]  # a folder may import itself
    found = {i for i in imports(sources()[module]) if within == "fastdlp" or not i.startswith(within)}
    found -= {"fastdlp.errors", "fastdlp.errors.FastdlpError"}
    for forbidden in never:
        assert not [i for i in found if i.startswith(forbidden)], f"{module} imports {forbidden}"


def test_one_door_to_open_clip() -> None:
    doors = {name for name, path in sources().items() if any(i.partition(".")[0] == "open_clip" for i in imports(path))}
    assert doors == {"fastdlp.clip", "fastdlp.pretrain"}


def test_engine_names_no_method() -> None:
    text = (ROOT / "fastdlp/engine.py").read_text().lower()
    assert not [name for name in ("feddlp", "flora", '"local"', '"global"') if name in text]


def test_importing_is_light() -> None:
    """`import fastdlp`, the config and the command line do not load torch: --help and bad options answer at once."""
    code = (
        "import sys, fastdlp, fastdlp.config, fastdlp.cli.main, fastdlp.data.names, fastdlp.methods;"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_public_names() -> None:
    import fastdlp

    for name in fastdlp.__all__:
        assert getattr(fastdlp, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fastdlp.no_such_name


def test_no_machine_and_no_host_in_the_project() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".sh", "") and path.is_file() and path.name != "LICENSE":
            text = path.read_text(errors="ignore")
            assert "/" + "work/" not in text, name
            assert "/" + "root/" not in text, name
