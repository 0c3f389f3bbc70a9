"""Packaging, the direction of imports, and importing without side effects."""

from __future__ import annotations

import ast
import graphlib
import importlib
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


# Each package imports only from itself and from those before it.
LAYERS = ("", "data", "adapters", "clip", "methods", "engine", "run", "export", "report")
STANDARD_LIBRARY_ONLY = {"fastdlp.config", "fastdlp.errors", "fastdlp.files", "fastdlp.processes", "fastdlp.selection"}
PROGRAMS = {"fastdlp", "fastdlp.__main__", "fastdlp.pretrain"}  # nothing imports them but through `fastdlp.__all__`


def edges() -> set[tuple[str, str]]:
    """(importer, imported) between modules of the distribution, wherever in a file the import stands."""
    modules = sources()
    found = set()
    for name, path in modules.items():
        for imported in imports(path):
            target = imported if imported in modules else imported.rpartition(".")[0]
            if target in modules and target != name:
                found.add((name, target))
    return {(a, b) for a, b in found if b not in packages()}


def packages() -> set[str]:
    """Modules that are an `__init__.py`, but `fastdlp.methods`, whose `__init__.py` lists the methods."""
    return {name for name, path in sources().items() if path.name == "__init__.py"} - {"fastdlp.methods"}


def layer(module: str) -> int:
    """Position of a module's package in LAYERS."""
    return LAYERS.index(module.split(".")[1] if module.count(".") > 1 or module == "fastdlp.methods" else "")


def test_packages_import_from_earlier_packages_only() -> None:
    library = (
        {name for name in sources() if name.split(".")[1:2] not in (["kernels"], ["cli"], ["bench"])}
        - PROGRAMS
        - packages()
    )
    assert {name for name in library if layer(name) == 0} == STANDARD_LIBRARY_ONLY
    upward = {(a, b) for a, b in edges() if a in library and b not in library and not b.startswith("fastdlp.kernels.")}
    upward |= {(a, b) for a, b in edges() if a in library and b in library and layer(b) > layer(a)}
    assert upward == set()


def of_fastdlp(module: str) -> set[str]:
    """Imports of a module from the distribution, packages and names included."""
    return {i for i in imports(sources()[module]) if i.partition(".")[0] == "fastdlp"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("fastdlp.kernels", ("kernels",)),
        ("fastdlp.config", ("errors",)),
        ("fastdlp.methods", ("adapters.branches", "config", "errors", "methods")),
        ("fastdlp.engine", ("adapters", "clip.stem", "clip.tower", "engine", "errors", "files", "kernels", "processes",
                            "selection", "methods.base", "methods.losses", "__version__")),
    ],
)  # fmt: skip
def test_imports_within_a_layer(package: str, allowed: tuple[str, ...]) -> None:
    """Methods do not depend on the bank, kernels or the engine; the engine on no method, data set or config."""
    for module in sources():
        if module == package or module.startswith(f"{package}."):
            found = of_fastdlp(module) - {"fastdlp", "fastdlp.kernels", "fastdlp.methods"}
            other = {i for i in found if not f"{i}.".startswith(tuple(f"fastdlp.{name}." for name in allowed))}
            assert other == set(), module
            assert "fastdlp" not in of_fastdlp(module) or package == "fastdlp.engine", module


def test_imported_names_exist() -> None:
    """The type checker does not follow imports of kernels, cli and bench, whose folders are mapped to fastdlp."""
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastdlp":
                for alias in node.names:
                    imported = importlib.import_module(str(node.module))
                    found = hasattr(imported, alias.name) or f"{node.module}.{alias.name}" in sources()
                    assert found, f"{module}: {node.module} has no {alias.name}"


def test_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for a, b in edges():
        graph.setdefault(a, set()).add(b)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_base_modules_import_the_standard_library_only() -> None:
    for name, path in sources().items():
        if name in STANDARD_LIBRARY_ONLY:
            assert {i.partition(".")[0] for i in imports(path)} <= sys.stdlib_module_names | {"fastdlp"}, name


def test_one_module_imports_open_clip() -> None:
    importers = {
        name for name, path in sources().items() if any(i.partition(".")[0] == "open_clip" for i in imports(path))
    }
    assert importers == {"fastdlp.clip.load"}


def test_engine_names_no_method() -> None:
    for name in ("engine", "sequential", "aggregation", "schedule", "round_losses"):
        text = (ROOT / f"fastdlp/engine/{name}.py").read_text().lower().replace("feddlp, section", "")
        assert not [method for method in ("feddlp", "flora", '"local"', '"global"') if method in text], name


def test_importing_is_light() -> None:
    """`import fastdlp`, the config and the command line do not load torch: --help and bad options answer at once."""
    code = (
        "import sys, fastdlp, fastdlp.config, fastdlp.cli.main, fastdlp.data.registry, fastdlp.methods;"
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
