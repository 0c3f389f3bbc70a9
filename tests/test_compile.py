"""Every kernel compiles for sm_80 and sm_90 without a spill, and what does not meet the conditions is reported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from fastdlp.bench import cases, compile
from fastdlp.bench.fastdlp_rounds import EngineRounds
from fastdlp.bench.problem import make_problem
from fastdlp.bench.sass import main_loop
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
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_nothing_spills_and_everything_fits(result: dict[str, Any]) -> None:
    assert result["failed"] == []
    assert {row["arch"] for row in result["rows"]} == {"80", "90"}
    for row in result["rows"]:
        assert 0 < row["registers"] <= 255, row
        assert (row["stack"], row["spill_stores"], row["spill_loads"]) == (0, 0, 0), row
        assert row["shared"] <= {"80": 163, "90": 227}[row["arch"]] * 1024, row


@pytest.mark.slow
def test_no_kernel_is_left_out(result: dict[str, Any]) -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    kernels = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    expected = {name for name in kernels if name.endswith("_kernel")}
    of = {arch: {row["kernel"] for row in result["rows"] if row["arch"] == arch} for arch in ("80", "90")}
    assert of == {"80": expected, "90": expected}


@pytest.mark.slow
def test_only_hopper_loads_through_tensor_descriptors() -> None:
    done = compiling("-c", DESCRIPTORS_BY_ARCHITECTURE)
    assert (done.returncode, done.stdout) == (0, "['90']\n"), done.stderr


DESCRIPTORS_BY_ARCHITECTURE = """
from fastdlp.bench.compile import list_jobs

jobs, _ = list_jobs(["80", "90"], small=True)
print(sorted({job.arch for job in jobs if job.constexprs.get("DESCRIPTORS")}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_products_run_on_tensor_cores(result: dict[str, Any], arch: str) -> None:
    """What each large tile needs is a condition of its own, see `test_what_makes_a_kernel_fail`."""
    rows = [row for row in result["rows"] if row["kernel"].startswith("product") and row["arch"] == arch]
    half = [row for row in rows if row["dtype"] == "bf16"]
    assert len(half) == 1
    for row in half:
        assert row["hgmma" if arch == "90" else "hmma"] > 0, row
        assert row["async_loads"] > 0, row
        codes = row["mma"].split(", ")
        assert any(code.startswith(TENSOR_CODE[arch]) for code in codes), row
        assert all(code.endswith(".bf16") for code in codes), row


@pytest.mark.slow
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

job = next(job for job in list_jobs(["80"], small=True)[0] if job.kernel.startswith("product") and job.dtype == "bf16")
sizes = {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64}
record = job.record | {"constant_vals": list((job.by_name("constant") | sizes).values())}
record["options"] |= {"num_warps": 4, "num_stages": 5}
job = replace(job, specialization=json.dumps(record))
figures = compile_job(job)
print(json.dumps([figures, faults(job, figures)]))
"""


@pytest.mark.slow
def test_the_log_of_ptxas_is_kept_in_the_cache(tmp_path: Path) -> None:
    """Compiled, from the cache, and from a cache without the log; the kernel's operands are host tensor descriptors."""
    (tmp_path / "descriptors.py").write_text(DESCRIPTORS)
    done = compiling(tmp_path / "descriptors.py")
    assert done.returncode == 0, done.stderr
    signature, *results = json.loads(done.stdout)
    assert signature["a"].startswith("tensordesc<bf16[128,")
    figures, faults, _ = results[0]
    for *others, log in results:
        assert others == [figures, faults]
        assert f"Used {figures['registers']} registers" in log
    assert faults == []
    assert figures["mma"] == "wgmma.m64n256k16.bf16"
    assert 0 == figures["drains"] < figures["waits"] < figures["hgmma"] == 4
    assert (figures["async_loads"], figures["loads"]) == (2, 0)


DESCRIPTORS = """
import json, os
from pathlib import Path

cache = Path(__file__).parent / "cache"
os.environ["TRITON_CACHE_DIR"] = str(cache)  # before Triton is imported

import torch, triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from fastdlp.bench import compile
from fastdlp.bench.compile import compile_job, faults
from fastdlp.kernels.launch import Launch


@triton.jit
def product_kernel(a, b, out_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([0, k]), b.load([0, k]).T, acc)
    tl.store(out_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], acc)


x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
a, b = (TensorDescriptor.from_tensor(x, [rows, 64]) for rows in (128, 256))
options = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
compile.launches_of = lambda small: [
    ("case", Launch(product_kernel, (1,), (a, b, torch.empty(128, 256, device="meta"), 256), options))
]
[job] = compile.list_jobs(["90"], True)[0]
results = []
for keep in (True, False, True):
    figures = compile_job(job)
    [log] = cache.rglob("ptxas.log")
    results.append((figures, faults(job, figures), log.read_text()))
    if not keep:
        log.unlink()
print(json.dumps([job.record["signature"], *results]))
"""


def job(
    arch: str = "90",
    kernel: str = "product_kernel",
    signature: Mapping[str, str] = MappingProxyType({"x_ptr": "*bf16"}),
    constants: Mapping[str, Any] = MappingProxyType({"BLOCK_M": 64}),
    aligned: Sequence[str] = (),
) -> compile.Job:
    """As the JIT would record it, with four warps and three stages."""
    names = list(signature | dict.fromkeys(constants, "constexpr"))
    record = {
        "name": f"somewhere.{kernel}",
        "signature": signature | dict.fromkeys(constants, "constexpr"),
        "constant_keys": [[names.index(name)] for name in constants],
        "constant_vals": list(constants.values()),
        "attrs_keys": [[names.index(name)] for name in aligned],
        "attrs_vals": [[["tt.divisibility", 16]] for _ in aligned],
        "options": {"num_warps": 4, "num_stages": 3},
    }
    return compile.Job(arch, json.dumps(record))


MMA = "mma.sync.m16n8k16.bf16"
ALIGNED_K = {"signature": {"x_ptr": "*bf16", "K": "i32"}, "aligned": ["x_ptr", "K"]}


def fine(**changes: Any) -> dict[str, Any]:
    """What `compile_job` returns for a kernel that passes, but for `changes`."""
    figures = {"registers": 255, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 227 * 1024}
    figures |= {"mma": "wgmma.m64n128k16.bf16", **dict.fromkeys(compile.COUNTED, 0), "hgmma": 4, "waits": 1}
    return figures | {"async_loads": 8, "barriers": 2, "warnings": []} | changes


@pytest.mark.parametrize(
    ("of", "changes", "fault"),
    [
        ({}, {}, None),
        ({"arch": "80"}, {"shared": 163 * 1024, "mma": MMA, "hgmma": 0, "hmma": 8, "waits": 0}, None),
        ({"signature": {"x_ptr": "*fp32"}}, {"mma": "-", "hgmma": 0, "waits": 0}, None),
        ({"kernel": "down_kernel"}, {"mma": "-"}, None),
        ({"constants": {"BLOCK_M": 32}}, {"mma": MMA, "hgmma": 0, "waits": 0}, None),
        ({"signature": {"x_ptr": "*fp16"}}, {"mma": "wgmma.m64n128k16.f16"}, None),
        ({"signature": {"x": "tensordesc<fp16[64, 64]>"}}, {"mma": "wgmma.m64n128k16.f16"}, None),
        ({}, {"mma": f"{MMA}, wgmma.m64n128k16.bf16"}, None),  # of a product with few rows, after the main loop
        ({}, {"mma": f"{MMA}, wgmma.m64n128k16.bf16", "hgmma": 0, "hmma": 8}, "expected wgmma of bf16"),
        ({"kernel": "down_kernel"}, {"waits": 4, "drains": 4}, None),
        ({}, {"hgmma": 5, "waits": 3}, None),
        ({}, {"hgmma": 5, "waits": 6}, "6 waits for 5 HGMMA in the main loop"),
        ({}, {"hgmma": 1}, None),
        ({}, {"hgmma": 1, "drains": 1}, "1 waits for 1 HGMMA"),
        ({}, {"waits": 4}, "4 waits for 4 HGMMA in the main loop"),
        ({"constants": {"BLOCK_M": 32}}, {"waits": 4}, "4 waits for 4 HGMMA in the main loop"),
        ({"kernel": "down_kernel"}, {"warnings": ["C7510: serialized"]}, "ptxas C7510: serialized"),
        ({}, {"stack": 8, "spill_stores": 4}, "8 bytes of stack, 4 stored, 0 loaded"),
        ({}, {"spill_loads": 16}, "0 stored, 16 loaded"),
        (ALIGNED_K, {"async_loads": 0}, "no asynchronous loads"),
        (ALIGNED_K | {"aligned": ["x_ptr"]}, {"async_loads": 0}, None),
        (ALIGNED_K | {"constants": {"BLOCK_M": 32}}, {"async_loads": 0}, None),
        ({}, {"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, 232448 are allowed"),
        ({"arch": "80"}, {"mma": MMA, "hgmma": 0, "hmma": 8}, "232448 bytes of shared memory, 166912 are allowed"),
        ({}, {"mma": MMA}, "expected wgmma of bf16"),
        ({}, {"mma": "-"}, "tensor code -, expected wgmma"),
        ({}, {"mma": "wgmma.m64n128k16.bf16, wgmma.m64n128k8.tf32"}, "expected wgmma of bf16"),
    ],
)
def test_what_makes_a_kernel_fail(of: dict[str, Any], changes: dict[str, Any], fault: str | None) -> None:
    faults = compile.faults(job(**of), fine(**changes))
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


@pytest.mark.slow
def test_a_row_that_no_launch_uses_is_found() -> None:
    done = compiling("-c", UNUSED_ROW)
    assert done.returncode == 0, done.stderr
    [(arch, row)] = json.loads(done.stdout)
    assert (arch, json.loads(row)["rows_to"]) == ("80", 7)


UNUSED_ROW = """
import json
from fastdlp.bench.compile import list_jobs
from fastdlp.kernels import tiles

rows = tiles.table()["80"]["rows"]
rows.insert(1, rows[0] | {"rows_to": 7})
print(json.dumps(list_jobs(["80"], small=True)[1]))
"""


def launch_flags(launch: Launch) -> tuple[Any, ...]:
    """What a launch is besides its tile and its shapes."""
    ours = {name: value for name, value in launch.options.items() if not name.startswith(("BLOCK", "num_", "EVEN"))}
    return launch.kernel.fn.__name__, *ours.items()


def test_the_cases_hold_what_an_engine_launches(tmp_path: Path) -> None:
    with tiles.assume("80"):
        listed = {launch_flags(launch) for _, launch in cases.launches_of(small=False)}
        assert {dict(flags[1:]).get("ACTIVATION", "none") for flags in listed} == {"none", *cases.ACTIVATIONS}
        problem = make_problem(tiny_clip(tmp_path / "model", quick_gelu=True), 2, clients=2)
        for teacher in ("fresh", "pre-update"):
            engine = EngineRounds(problem, "fp32", torch.device("cpu"), "triton", teacher=teacher).engine
            with recording(dry=True) as launches:
                engine.train_round(1)
            launched = {launch_flags(launch) for launch in launches}
            assert len(launched) > 20
            assert launched <= listed


def test_what_a_job_says_of_its_kernel() -> None:
    kernel = job(
        signature={"x_ptr": "*bf16", "c_ptr": "*fp32", "one": "constexpr", "K": "i32", "FLAG": "constexpr"},
        constants={"one": 1, "FLAG": True, "OFF": False, "BLOCK_M": 64},
        aligned=["x_ptr", "K"],
    )
    assert (kernel.arch, kernel.kernel, kernel.dtype) == ("90", "product_kernel", "bf16")
    assert kernel.by_name("constant") == {"one": 1, "FLAG": True, "OFF": False, "BLOCK_M": 64}
    assert kernel.constexprs == {"FLAG": True, "OFF": False, "BLOCK_M": 64}
    assert kernel.by_name("attrs").keys() == {"x_ptr", "K"}
    assert str(kernel) == "FLAG=True BLOCK_M=64, 4 warps, 3 stages"
    assert job(signature={"x_ptr": "*fp32"}, constants={"PRECISION": "tf32"}).dtype == "tf32"


@pytest.mark.slow
def test_jobs_are_what_the_jit_specializes(tmp_path: Path) -> None:
    """An address 12 bytes into its storage and an odd number are not marked, and a count does not matter."""
    (tmp_path / "specialized.py").write_text(SPECIALIZED)
    done = compiling(tmp_path / "specialized.py")
    assert done.returncode == 0, done.stderr
    kinds, constants, attributes, number = json.loads(done.stdout)
    constant = "constexpr"
    assert kinds == ["*bf16", "*fp32", constant, constant, "i32", "i32", "i64", "i32", "fp32", "i32", constant]
    assert constants == {"bias_ptr": None, "one": 1, "BLOCK": 64}
    assert [name for name, marks in attributes.items() if marks] == ["x_ptr", "even", "long", "zero"]
    assert number == 1


SPECIALIZED = """
import json

import torch, triton
import triton.language as tl
from fastdlp.bench import compile
from fastdlp.kernels.launch import Launch


@triton.jit(do_not_specialize=["count"])
def some_kernel(x_ptr, c_ptr, bias_ptr, one, even, odd, long, zero, eps, count, BLOCK: tl.constexpr):
    pass


x, c = torch.empty(3, 4, dtype=torch.bfloat16, device="meta"), torch.empty(12, device="meta")[3:]
operands, options = (x, c, None, 1, 32, 7, 1 << 31, 0, 1e-5), {"BLOCK": 64, "num_warps": 8, "num_stages": 3}
launches = [Launch(some_kernel, (1,), (*operands, count), options) for count in (1, 16)]
compile.launches_of = lambda small: [("case", launch) for launch in launches]
jobs, _ = compile.list_jobs(["90"], True)
job = next(iter(jobs))
print(json.dumps([list(job.record["signature"].values()), job.by_name("constant"), job.by_name("attrs"), len(jobs)]))
"""


def test_reading_assembly() -> None:
    ptx = """
        wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};
    """
    expected = ["mma.sync.m16n8k16.bf16", "mma.sync.m16n8k8.tf32", "wgmma.m64n256k16.bf16"]
    assert compile.tensor_instructions(ptx * 2) == expected
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'f'
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 154 registers, used 1 barriers
"""
    expected = ["C7515: Potential Performance Loss: wgmma.mma_async instructions are serialized"]
    assert compile.performance_warnings(log * 2) == expected
    expected_resources = {"registers": 154, "stack": 8, "spill_stores": 12, "spill_loads": 20}
    assert compile.resources(log) == expected_resources


MAIN_LOOP = """
    /*0000*/ LDG.E R1, desc[UR4][R2.64] ;
    /*0010*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*0020*/ HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR4], R24, gsb0 ;
    /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0040*/ @P1 BRA 0x0 ;
    /*0050*/ SHFL.BFLY PT, R1, R2, 0x10, 0x1f ;
    /*0060*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R17 ;
    /*0070*/ @!P0 BRA 0x120 ;
    /*0080*/ WARPGROUP.ARRIVE ;
    /*0090*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
    /*00a0*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
    /*00b0*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    /*00c0*/ @UP0 UTMALDG.2D [UR16], [UR20] ;
    /*00d0*/ @P2 LDGSTS.E.BYPASS.128 [R5], desc[UR24][R6.64] ;
    /*00e0*/ BRA !UP3, 0x60 ;
    /*00f0*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0100*/ @P3 EXIT ;
    /*0110*/ BRA 0x0 ;
    /*0120*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R17 ;
    /*0130*/ @!P0 BRA 0x120 ;
    /*0140*/ BRA 0x80 ;
    /*0150*/ BRA 0x150;
"""
PLAIN_LOOP = """
    /*0000*/ SHFL.BFLY PT, R1, R2, 0x10, 0x1f ;
    /*0010*/ @P0 BRA 0x10 ;
    /*0020*/ LDG.E R1, desc[UR4][R2.64] ;
    /*0030*/ BRA.DIV UR4, 0x80 ;
    /*0040*/ BAR.RED.POPC.DEFER_BLOCKING 0x0, P1 ;
    /*0050*/ SHFL.BFLY PT, R1, R2, 0x10, 0x1f ;
    /*0060*/ @P0 BRA 0x20 ;
    /*0070*/ EXIT ;
    /*0080*/ SHFL.BFLY PT, R1, R2, 0x10, 0x1f ;
    /*0090*/ BRA 0x60 ;
"""


def counted(sass: str) -> dict[str, int]:
    """What `compile_job` counts in the main loop, without zeros, and the number of its instructions."""
    loop = main_loop(sass)
    counts = {name: sum(bool(re.search(pattern, line)) for line in loop) for name, pattern in compile.COUNTED.items()}
    return {name: count for name, count in counts.items() if count} | {"all": len(loop)}


def test_the_main_loop() -> None:
    """Nested in a persistent loop, after a low-rank loop with fewer instructions; the retry of its wait lies apart."""
    assert counted(MAIN_LOOP) == {"hgmma": 2, "waits": 1, "async_loads": 2, "all": 10}
    assert counted(PLAIN_LOOP) == {"barriers": 1, "loads": 1, "all": 5}
    straight = "".join(line for line in PLAIN_LOOP.splitlines(keepends=True) if "@" not in line)
    assert counted(straight) == {"barriers": 1, "loads": 1, "all": 6}


def test_hgmma_of_the_epilogue_do_not_hide_a_serialized_main_loop() -> None:
    """The whole kernel has fewer waits than HGMMA; its main loop, two for two."""
    serialized = MAIN_LOOP.replace("WARPGROUP.ARRIVE ", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ")
    epilogue = "".join(f"/*00{n}*/ HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24 ;\n" for n in ("e4", "e8", "ec"))
    serialized = serialized.replace("/*00f0*/", f"{epilogue}/*00f0*/")
    assert counted(serialized) == {"hgmma": 2, "waits": 2, "drains": 1, "async_loads": 2, "all": 10}
    assert compile.faults(job(), fine(**counted(serialized)))
    assert len(re.findall(compile.COUNTED["waits"], serialized)) < len(re.findall(r"\bHGMMA\b", serialized))


def row(**changes: Any) -> dict[str, Any]:
    """A row of a result without faults, but for `changes`."""
    named = {"kernel": "product_kernel", "arch": "90", "dtype": "bf16"}
    return named | fine(compiled=1) | changes


def test_a_row_has_the_worst_of_its_kernels() -> None:
    found = compile.worst([fine(registers=90, shared=8), fine(registers=80, shared=64, hgmma=2, waits=2, mma=MMA)])
    assert (found["registers"], found["shared"], found["compiled"]) == (90, 64, 2)
    assert (found["hgmma"], found["waits"]) == (2, 2)
    assert found["mma"] == f"{MMA}, wgmma.m64n128k16.bf16"
    assert compile.worst([fine(mma="-")])["mma"] == "-"


def test_rows_are_by_kernel_and_faults_by_case(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, large, half = job(), job(constants={"BLOCK_M": 128}), job(signature={"x_ptr": "*fp16"})
    jobs = {fits: "a case", large: "another", half: "a third"}
    figures = {fits: fine(), large: fine(stack=8), half: fine(mma="wgmma.m64n128k16.f16")}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compile, "list_jobs", lambda *_: (jobs, [("80", "{}")]))
    monkeypatch.setattr(compile, "ProcessPoolExecutor", lambda cores, context: ThreadPoolExecutor(cores))
    monkeypatch.setattr(compile, "compile_job", figures.__getitem__)
    result = compile.bench_compile(["90"], True, lambda text: None)
    assert [(row["dtype"], row["compiled"], row["stack"]) for row in result["rows"]] == [("bf16", 2, 8), ("fp16", 1, 0)]
    assert result["failed"] == [
        "sm_80: no launch uses this row of tiles.json: {}",
        "sm_90 product_kernel bf16, another (BLOCK_M=128, 4 warps, 3 stages): registers do not suffice: 8 bytes of "
        "stack, 0 stored, 0 loaded",
    ]


def test_the_command_fails_with_a_line_for_every_fault(
    cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = {"what": "kernels", "command": "a command", "commit": "abc", "versions": {"triton": "3"}, "device": "X"}
    result = {**facts, "threads": 1, "rows": [row(), row(dtype="fp16", stack=8)], "failed": ["sm_90 a fault"]}
    monkeypatch.setattr(compile, "bench_compile", lambda *_: result)
    files = tmp_path / "compile.json", tmp_path / "compile.md"
    code, out, err = cli("bench", "compile", "--json", "--output", files[0], "--markdown", files[1])
    assert (code, err) == (1, "sm_90 a fault\n")
    assert json.loads(out) == result
    assert files[0].read_text() == out
    line = "| product | 90 | fp16 | 1 | 255 | 8 | 232,448 | 4/1 | 2 | 0+8 | wgmma.m64n128k16.bf16 |"
    assert line in files[1].read_text()
    monkeypatch.setattr(compile, "bench_compile", lambda *_: result | {"failed": []})
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
