"""Every kernel compiles for sm_80 and sm_90 without a spill, and what would not is told."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdlp.bench import cases, compile
from fastdlp.bench.engine import image_rounds
from fastdlp.bench.problem import make_problem
from fastdlp.kernels import tiles
from fastdlp.kernels.launch import Launch, recording
from tests.conftest import CLI
from tests.models import tiny_clip

ROOT = Path(__file__).resolve().parent.parent
TENSOR_CODE = {"80": "mma.sync.m16n8k16.bf16", "90": "wgmma."}


def compiling(*command: object) -> subprocess.CompletedProcess[str]:
    """Python in a process where Triton compiles: in this one it may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Both architectures: every tile, and the awkward shapes."""
    done = compiling("-m", "fastdlp", "bench", "compile", "--arch", "80", "--arch", "90", "--small", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_spills_and_everything_fits(result: dict[str, Any]) -> None:
    assert result["never_taken"] == []
    assert {row["arch"] for row in result["rows"]} == {"80", "90"}
    for row in result["rows"]:
        assert 0 < row["registers"] <= 255, row
        assert (row["stack"], row["local"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0, 0), row
        assert row["shared"] <= {"80": 163, "90": 227}[row["arch"]] * 1024, row
        assert row["faults"] == []


def test_no_kernel_is_left_out(result: dict[str, Any]) -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("_*.py")]
    kernels = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    expected = {name for name in kernels if name.endswith("_kernel")}
    for arch in ("80", "90"):
        assert {row["kernel"] for row in result["rows"] if row["arch"] == arch} == expected


@pytest.mark.parametrize("arch", ["80", "90"])
def test_large_products_run_on_tensor_cores(result: dict[str, Any], arch: str) -> None:
    rows = [row for row in result["rows"] if row["kernel"] == "product_kernel" and row["arch"] == arch]
    large = [row for row in rows if row["dtype"] == "bf16" and row["constexprs"]["BLOCK_M"] >= 64]
    assert {row["constexprs"]["ACTIVATION"] for row in large} == {"none", *cases.ACTIVATIONS}
    for row in large:
        for code in row["mma"].split(", "):
            assert code.startswith(TENSOR_CODE[arch]), row
            assert code.endswith(".bf16"), row


def test_a_tile_too_large_fails() -> None:
    """A product of 256 × 128 with 4 warps has twice the accumulators that 4 warps have registers for."""
    done = compiling("-c", OVERSIZED)
    assert done.returncode == 0, done.stderr
    figures, faults = json.loads(done.stdout)
    assert figures["stack"] > 0
    assert figures["spill_stores"] > 0
    assert figures["spill_loads"] > 0
    assert figures["shared"] > 163 * 1024
    assert "registers do not suffice" in faults[0]
    assert "shared memory" in faults[1]


OVERSIZED = """
import json
from dataclasses import replace
from fastdlp.bench.compile import compile_job, faults, list_jobs

job = next(job for job in list_jobs(["80"], small=True)[0] if (job.kernel, job.dtype) == ("product_kernel", "bf16"))
sizes = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64}
job = replace(job, constants=tuple((dict(job.constants) | sizes).items()), warps=4, stages=5)
figures = compile_job(job)
row = {"kernel": job.kernel, "arch": "80", "dtype": job.dtype, "constexprs": job.constexprs, **figures}
print(json.dumps([figures, faults(row)]))
"""


def fine(**changes: Any) -> dict[str, Any]:
    """A row that passes, but for `changes`."""
    row = {"kernel": "product_kernel", "arch": "90", "dtype": "bf16", "case": "a case", "compiled": 1}
    row |= {"constexprs": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_R": 16}, "num_warps": 4, "num_stages": 3}
    row |= {"registers": 255, "stack": 0, "local": 0, "spill_stores": 0, "spill_loads": 0, "shared": 227 * 1024}
    return row | {"mma": "wgmma.m64n128k16.bf16", "faults": []} | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"arch": "80", "shared": 163 * 1024, "mma": "mma.sync.m16n8k16.bf16"}, None),
        ({"dtype": "fp32", "mma": "-"}, None),
        ({"kernel": "down_kernel", "mma": "-"}, None),
        ({"constexprs": {"BLOCK_M": 32}, "mma": "mma.sync.m16n8k16.bf16"}, None),
        ({"dtype": "fp16", "mma": "wgmma.m64n128k16.f16"}, None),
        ({"stack": 8, "spill_stores": 4}, "8 bytes of stack and local memory, 4 stored, 0 loaded"),
        ({"local": 16}, "16 bytes of stack"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, 232448 are allowed"),
        ({"arch": "80", "mma": "mma.sync.m16n8k16.bf16"}, "232448 bytes of shared memory, 166912 are allowed"),
        ({"mma": "mma.sync.m16n8k16.bf16"}, "expected wgmma of bf16"),
        ({"mma": "-"}, "tensor code -, expected wgmma"),
        ({"mma": "wgmma.m64n128k16.bf16, wgmma.m64n128k8.tf32"}, "expected wgmma of bf16"),
    ],
)
def test_what_makes_a_row_fail(changes: dict[str, Any], told: str | None) -> None:
    faults = compile.faults(fine(**changes))
    assert len(faults) == (told is not None)
    assert told is None or told in faults[0]


def test_a_row_that_nothing_takes_is_told() -> None:
    done = compiling("-c", DEAD_ROW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sm_80: no launch takes this row of tiles.json: {")
    assert '"rows_to": 7' in done.stdout
    assert len(done.stdout.splitlines()) == 1


DEAD_ROW = """
from fastdlp.bench.compile import failures, list_jobs
from fastdlp.kernels import tiles

rows = tiles.table()["80"]["rows"]
rows.insert(1, rows[0] | {"rows_to": 7})
never_taken = list_jobs(["80"], small=True)[1]
print(*failures({"never_taken": never_taken, "rows": []}), sep="\\n")
"""


def launch_flags(launch: Launch) -> tuple[Any, ...]:
    """What a launch is besides its tile and its shapes."""
    ours = {name: value for name, value in launch.options.items() if not name.startswith(("BLOCK", "num_", "EVEN"))}
    return launch.kernel.fn.__name__, *ours.items()


def test_the_cases_hold_what_an_engine_launches(tmp_path: Path) -> None:
    with tiles.assume("80"):
        listed = {launch_flags(launch) for _, launch in cases.launches_of(small=False)}
        problem = make_problem(tiny_clip(tmp_path / "model", quick_gelu=True), 2, clients=2)
        for teacher in ("fresh", "pre-update"):
            engine = image_rounds(problem, "fp32", torch.device("cpu"), "triton", teacher=teacher).engine
            with recording(dry=True) as launches:
                engine.train_round(1)
            launched = {launch_flags(launch) for launch in launches}
            assert len(launched) > 20
            assert launched <= listed


def test_specialised_as_the_jit_does() -> None:
    names = ["x_ptr", "c_ptr", "bias_ptr", "one", "even", "odd", "long", "zero", "eps", "count", "FLAG", "BLOCK"]
    kernel = SimpleNamespace(
        arg_names=names,
        params=[SimpleNamespace(name=name, do_not_specialize=name == "count") for name in names],
        fn=SimpleNamespace(__module__="somewhere", __name__="some_kernel"),
    )
    x = torch.empty(3, 4, dtype=torch.bfloat16)
    c = torch.empty(12)[3:]  # 12 bytes into its storage
    operands = (x, c, None, 1, 32, 7, 1 << 31, 0, 1e-5)
    options = {"FLAG": True, "BLOCK": 64, "num_warps": 8, "num_stages": 3}
    job, other = (compile.specialised(Launch(kernel, (1,), (*operands, n), options), "90") for n in (1, 16))
    assert job == other
    constant = "constexpr"
    kinds = ["*bf16", "*fp32", constant, constant, "i32", "i32", "i64", "i32", "fp32", "i32", constant, constant]
    assert job.signature == tuple(zip(names, kinds, strict=True))
    assert [names[position] for position in job.aligned] == ["x_ptr", "even", "long", "zero"]
    assert dict(job.constants) == {"bias_ptr": None, "one": 1, "FLAG": True, "BLOCK": 64}
    assert job.constexprs == {"FLAG": True, "BLOCK": 64}
    assert (job.arch, job.warps, job.stages, job.dtype) == ("90", 8, 3, "bf16")
    assert job.integers == "one=1 even:16 odd long:16 zero:16 count"


def test_reading_assembly() -> None:
    ptx = """
        wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};
    """
    expected = ["mma.sync.m16n8k16.bf16", "mma.sync.m16n8k8.tf32", "wgmma.m64n256k16.bf16"]
    assert compile.tensor_instructions(ptx * 2) == expected
    sass = "STL.64 [R1], R2 ; @P0 STL [R1+0x8], R4 ; LDL.LU.128 R4, [R1] ; LDL R2, [R1+0x4] ; STG.E [R2], R3 ;"
    assert (compile.bytes_moved("STL", sass), compile.bytes_moved("LDL", sass)) == (12, 20)


def test_rows_of_one_configuration_are_merged() -> None:
    rows = [fine(registers=90, shared=8), fine(registers=80, shared=64, faults=["b"]), fine(dtype="fp16")]
    same, other = compile.merged(rows, ("kernel", "dtype"))
    assert (same["registers"], same["shared"], same["faults"], same["compiled"]) == (90, 64, ["b"], 2)
    assert other["dtype"] == "fp16"


def test_the_command_fails_with_a_line_for_every_fault(
    cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = {"what": "kernels", "command": "a command", "commit": "abc", "triton": "3", "never_taken": []}
    rows = [fine(), fine(dtype="fp16", stack=8, faults=["registers do not suffice"])]
    monkeypatch.setattr(compile, "bench_compile", lambda *_: facts | {"rows": rows})
    files = tmp_path / "compile.json", tmp_path / "compile.md"
    code, out, err = cli("bench", "compile", "--json", "--output", files[0], "--markdown", files[1])
    assert code == 1
    assert err == "sm_90 product_kernel fp16, a case: registers do not suffice\n"
    assert json.loads(out) == facts | {"rows": rows}
    assert files[0].read_text() == out
    assert len([line for line in out.splitlines() if line.startswith('  {"kernel"')]) == 2
    assert "| product | 90 | fp16 | M64 N128 w4 s3 | 1 | 255 | 8 | 0 | 232,448 |" in files[1].read_text()
    monkeypatch.setattr(compile, "bench_compile", lambda *_: facts | {"rows": rows[:1]})
    code, out, err = cli("bench", "compile")
    assert (code, err) == (0, "")
    assert "wgmma.m64n128k16.bf16" in out


def test_refusals(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = cli("bench", "compile", "--json")
    assert (code, out) == (2, "")
    assert "TRITON_INTERPRET=1 has Triton interpret its kernels" in err
    code, _, err = cli("bench", "compile", "--arch", "75")
    assert code == 2
    assert "unknown --arch '75': choose from 80, 90" in err
