"""bench/gpu.sh on a machine without a GPU, over interpreters that stand in for one with it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Prints its device and what is installed, lists its calls, writes what --output names, and exits as asked.
STUB = r"""#!/usr/bin/env bash
case "$*" in
*get_device_name*) echo stub-gpu; exit ;;
*find_spec*) for name in $MISSING; do [[ "$*" == *"'$name'"* ]] && exit 1; done; exit 0 ;;
*json.tool*) exec PYTHON "$@" ;;
esac
echo "$*" >>"$CALLS"
for word; do [[ ${before:-} == --output ]] && echo '{}' >"$word"; before=$word; done
for name in $FAIL; do [[ "$*" == *"${name%=*}"* ]] && exit "${name#*=}"; done
[[ "$*" == *"${SLOW:-nothing}"* ]] && exec sleep 30
echo "this is ${3:-}"
"""

# The interpreter that runs the tests, as if open_clip were not installed; pytest collects and does not run.
WITHOUT_OPEN_CLIP = r"""#!/usr/bin/env bash
case "$*" in
*get_device_name*) echo stub-gpu; exit ;;
*"-m pytest"*) exec PYTHON "$@" --collect-only ;;
esac
exec PYTHON "$@"
"""
BLOCK = """
from functools import partial
from importlib.machinery import PathFinder

def find(plain, name, *rest):
    return None if name == "open_clip" else plain(name, *rest)

PathFinder.find_spec = partial(find, PathFinder.find_spec)
"""

Script = Callable[..., tuple[int, str, dict[str, str], list[str]]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run gpu.sh with an interpreter: (exit code, output, the archive's files, the stub's calls).

    The stub runs it in a folder of two files, because it may replace the tile table.
    """
    checkout = tmp_path / "checkout"
    for file in ("bench/gpu.sh", "kernels/tiles.json"):
        (checkout / file).parent.mkdir(parents=True)
        shutil.copy(ROOT / file, checkout / file)

    def run(stub: str = STUB, root: Path = checkout, **variables: str) -> tuple[int, str, dict[str, str], list[str]]:
        interpreter, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
        interpreter.write_text(stub.replace("PYTHON", shlex.quote(sys.executable)))
        interpreter.chmod(0o755)
        calls.write_text("")
        for tool in ("compute-sanitizer", "ncu"):
            if tool not in variables.get("MISSING", ""):
                (tmp_path / tool).write_text('#!/usr/bin/env bash\nexec "$PYTHON" "$(basename "$0")" "$@"\n')
                (tmp_path / tool).chmod(0o755)
        given = {"PYTHON": interpreter, "CALLS": calls, "OUT": out, "MISSING": "", "FAIL": ""}
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **{name: str(value) for name, value in given.items()}, **variables}
        done = subprocess.run(
            [root / "bench" / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        files: dict[str, str] = {}
        archive = out / "gpu-stub-gpu.tar.gz"
        if archive.exists():
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    if (content := tar.extractfile(member)) is not None:
                        files[member.name.removeprefix("./")] = content.read().decode()
        return done.returncode, done.stdout + done.stderr, files, calls.read_text().splitlines()

    return run


def ends(files: dict[str, str]) -> dict[str, str]:
    """How each stage ended, from the summary."""
    return dict(line.split(maxsplit=1) for line in files["summary.txt"].splitlines()[1:])


def test_the_default_stages(script: Script, tmp_path: Path) -> None:
    code, output, files, calls = script()
    assert code == 0, output
    stages = ["preflight", "tiles", "tests", "memcheck", "kernels", "round", "profile", "ncu"]
    assert list(ends(files)) == stages
    assert all(end.startswith("ok, ") for end in ends(files).values())
    assert len(calls) == len(stages)
    assert {f"{stage}.txt" for stage in stages} <= files.keys()
    assert {"log.txt", "summary.txt", "kernels.json", "round.json", "profile.json"} <= files.keys()
    assert "this is bench" in files["kernels.txt"]
    assert all(f"== {stage}: " in files["log.txt"] for stage in stages)
    assert (tmp_path / "out" / "gpu-stub-gpu.txt").read_text() == files["summary.txt"]
    assert output.endswith(files["summary.txt"])
    tests = next(call for call in calls if "test_cuda" in call)
    assert "-n 12" in tests
    assert "--maxfail=30" in tests
    assert "test_tower" in tests
    assert " -x" not in tests


def test_stages_by_name_and_in_order(script: Script) -> None:
    _, _, files, calls = script(STAGES="kernels preflight")
    assert list(ends(files)) == ["kernels", "preflight"]
    assert [call.split()[1] for call in calls] == ["fastdlp", "torch.utils.collect_env"]
    assert list(ends(script(STAGES="C")[2])) == ["preflight", "baselines", "text", "racecheck"]


def test_an_unknown_stage_is_refused_at_once(script: Script) -> None:
    code, output, files, calls = script(STAGES="preflight kernel")
    assert (code, files, calls) == (2, {}, [])
    assert "unknown stage kernel: choose from " in output


def test_no_gpu_is_reported(script: Script) -> None:
    code, output, files, _ = script("#!/bin/sh\nexit 1\n")
    assert (code, files) == (2, {})
    assert "torch sees no CUDA GPU here" in output


def test_a_failed_test_is_reported_and_the_run_continues(script: Script) -> None:
    code, _, files, _ = script(STAGES="tests kernels", FAIL="test_cuda.py=1")
    assert code == 1
    assert ends(files)["tests"].startswith("FAILED with exit code 1")
    assert ends(files)["kernels"].startswith("ok")


@pytest.mark.parametrize(("stage", "failure"), [("tiles", "test_each_tile=1"), ("memcheck", "compute-sanitizer=99")])
def test_nothing_is_timed_after_a_wrong_kernel(script: Script, stage: str, failure: str) -> None:
    code, _, files, calls = script(STAGES=f"{stage} kernels round tests", FAIL=failure)
    assert code == 1
    assert ends(files)["kernels"] == ends(files)["round"] == f"not begun: {stage} found a kernel wrong"
    assert ends(files)["tests"].startswith("ok")
    assert len(calls) == 2


def test_hazards_are_only_reported(script: Script) -> None:
    code, _, files, _ = script(STAGES="racecheck kernels", FAIL="racecheck=99")
    assert code == 0
    assert ends(files)["racecheck"].startswith("FAILED with exit code 99")
    assert ends(files)["kernels"].startswith("ok")


def test_what_is_missing_is_named(script: Script) -> None:
    missing = "open_clip peft xdist ncu compute-sanitizer"
    code, output, files, calls = script(
        STAGES="tests memcheck kernels round profile ncu baselines", MISSING=missing, PATH=os.environ["PATH"]
    )
    assert code == 0
    assert ends(files)["round"] == "left out: not installed: open_clip"
    assert ends(files)["baselines"] == "left out: not installed: open_clip peft"
    assert ends(files)["ncu"] == "left out: ncu is not on the PATH"
    assert ends(files)["kernels"].startswith("ok")
    assert "not installed: open_clip, for test_tower.py test_module.py" in files["summary.txt"]
    assert "pytest-xdist is not installed: one process" in output
    assert len(calls) == 2
    assert "-n" not in calls[0].split()
    assert "test_tower" not in calls[0]
    assert "--deselect tests/test_cuda.py::test_memory_stays_within_its_estimate" in calls[0]


def test_out_of_time(script: Script) -> None:
    """A stage that hangs is ended, a later one is not begun, and what there is is packed."""
    code, _, files, _ = script(STAGES="preflight kernels round", SLOW="bench kernels", BUDGET="6")
    assert code == 1
    assert ends(files)["preflight"].startswith("ok")
    assert ends(files)["kernels"].startswith("RAN OUT of its ")
    assert ends(files)["round"] == "not begun: 6 s are over"
    assert "kernels.json" in files


def test_a_table_comes_and_goes(script: Script, tmp_path: Path) -> None:
    table = json.loads((ROOT / "kernels" / "tiles.json").read_text())
    table["90"]["measured"] = {"device": "before"}
    (tmp_path / "table.json").write_text(json.dumps(table))
    code, _, files, calls = script(STAGES="tune", TILES=str(tmp_path / "table.json"), FAIL="tune=1")
    assert code == 1
    assert "--dtype bf16 --minutes 4." in calls[0]
    assert f"kernels/tiles.json is now {tmp_path / 'table.json'}" in files["log.txt"]
    assert json.loads(files["tiles.json"]) == table
    assert json.loads((tmp_path / "out" / "tiles-stub-gpu.json").read_text()) == table
    (tmp_path / "table.json").write_text("{")
    code, output, *_ = script(STAGES="tune", TILES=str(tmp_path / "table.json"))
    assert code == 2
    assert "is no tile table" in output


@pytest.mark.slow
def test_without_open_clip_nothing_fails_to_be_collected(script: Script, tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCK)
    code, output, files, _ = script(
        WITHOUT_OPEN_CLIP, ROOT, STAGES="preflight tests", PYTHONPATH=str(tmp_path / "blocked"), PROCESSES="0"
    )
    assert code == 0, output
    assert "PyTorch version: " in files["preflight.txt"]
    assert "not installed: open_clip, for test_tower.py" in files["summary.txt"]
    assert "test_dual_lora_ops.py" in files["tests.txt"]
    assert "test_training_follows_the_cpu" not in files["tests.txt"]
