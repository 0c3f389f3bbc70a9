"""`--backend auto` on a GPU that nobody has measured, with a timer, a clock and a device of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.adapters.bank import AdapterBank, Adapters
from fastdlp.adapters.branches import tower_sites
from fastdlp.adapters.optimizer import Hyperparameters
from fastdlp.clip.load import load_clip
from fastdlp.config import TrainConfig
from fastdlp.engine import autotune_units as units
from fastdlp.engine.autotune import TOLERANCE, Meter, Unit, cuda_identity, select, tolerance_of
from fastdlp.engine.autotune_units import Load, Pass, optimizer_unit, passes, tower_units
from fastdlp.engine.device import must_measure, pick_backend
from fastdlp.engine.distributed import ProcessGroup
from fastdlp.errors import FastdlpError
from fastdlp.files import cache_root
from fastdlp.kernels import backend as kernels_backend
from fastdlp.kernels import tiles
from fastdlp.kernels.groups import RowGroups
from fastdlp.methods import METHODS, make_method
from fastdlp.run import build_engine
from fastdlp.run.folder import RunFolder
from fastdlp.run.setup import Callbacks, prepare
from fastdlp.run.train import resume, train
from fastdlp.selection import Choice, Selection, backend_of, read_backend
from tests.models import tiny_clip

GPU = torch.device("cuda")
IDENTITY = {
    "device": "H200",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "kernels": "k",
    "dtype": "bf16",
    "setting": "s",
}
# Milliseconds of torch and of Triton.
MS = {("attention", 640): (2.0, 1.0), ("mlp", 640): (1.0, 2.0), ("attention", 64): (1.0, 1.5)}


@dataclass
class Machine:
    """Units whose backends take so many milliseconds, and what was made, timed and waited for."""

    ms: dict[tuple[str, int], tuple[float, float]] = field(default_factory=lambda: dict(MS))
    wrong: dict[tuple[str, int], Callable[[], list[Tensor]]] = field(default_factory=dict)  # Triton's result
    seconds: float = 1.0  # that pass between two looks at the clock
    made: list[tuple[str, int]] = field(default_factory=list)
    lost: bool = False
    now: float = 0.0
    last: tuple[tuple[str, int], str] = (("", 0), "")

    def all_units(self) -> list[Unit]:
        return [Unit(name, rows, partial(self.make, (name, rows))) for name, rows in self.ms]

    def make(self, key: tuple[str, int]) -> Callable[[str], list[Tensor]]:
        self.made.append(key)

        def run(backend: str) -> list[Tensor]:
            self.last = key, backend
            if backend == "triton" and key in self.wrong:
                return self.wrong[key]()
            return [torch.ones(3), torch.arange(4.0), torch.zeros(2), torch.zeros(0)]

        return run

    def time(self, call: Callable[[], object]) -> float:
        call()
        key, backend = self.last
        return self.ms[key][backend == "triton"]

    def clock(self) -> float:
        self.now += self.seconds
        return self.now

    def settle(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def select(self, cache: Path, identity: dict[str, str] = IDENTITY, budget: float = 60.0) -> Selection:
        return select(self.all_units(), identity, 0.01, Meter(self.time, self.clock, self.settle), cache, budget)


def backends(selection: Selection) -> list[str]:
    return [choice.backend for choice in selection.choices]


def test_the_faster_backend_of_every_unit_and_number_of_rows(tmp_path: Path) -> None:
    found = Machine().select(tmp_path)
    assert backends(found) == ["triton", "torch", "torch"]
    assert [found.backend("attention", n) for n in (1, 200, 205, 10_000)] == [
        "torch",
        "torch",
        "triton",
        "triton",
    ]
    assert (found.backend("mlp", 64), found.backend("elsewhere", 640)) == ("torch", "torch")
    assert found.reason == (
        "attention of 640 rows triton (1 ms against 2); mlp of 640 rows torch (1 ms against 2); "
        "attention of 64 rows torch (1 ms against 1.5); measured in 6 s"
    )


def _raises(error: Exception) -> Any:
    def run() -> list[Tensor]:
        raise error

    return run


WRONG: dict[str, tuple[Any, str, bool]] = {
    "output": (lambda: [2 * torch.ones(3), torch.arange(4.0), torch.zeros(2), torch.zeros(0)], "off by 1", True),
    "gradient": (
        lambda: [torch.ones(3), torch.tensor([0, 1, 2, 3.1]), torch.zeros(2), torch.zeros(0)],
        "Triton's result is off by 0.03",
        True,
    ),
    "not zero": (lambda: [torch.ones(3), torch.arange(4.0), torch.ones(2), torch.zeros(0)], "off by inf", True),
    "nan": (lambda: [torch.ones(3), torch.full((4,), float("nan")), torch.ones(2), torch.zeros(0)], "off by nan", True),
    "unwritten": (lambda: [torch.empty(3), torch.arange(4.0), torch.zeros(2), torch.zeros(0)], "off by nan", True),
    "shape": (lambda: [torch.ones(3)], "triton failed: ValueError", False),
    "compiler": (_raises(KeyError("no tile")), "triton failed: KeyError: 'no tile'", False),
    "memory": (_raises(torch.OutOfMemoryError("CUDA out of memory")), "triton failed: OutOfMemoryError", False),
}


@pytest.mark.parametrize(("wrong", "why", "kept"), WRONG.values(), ids=WRONG)
def test_a_wrong_backend_is_never_used(wrong: Any, why: str, kept: bool, tmp_path: Path) -> None:
    """Though it is the faster one. What a compiler or the memory refused may go well another time."""
    machine = Machine(wrong={("attention", 640): wrong})
    found = machine.select(tmp_path)
    assert backends(found) == ["torch", "torch", "torch"]
    assert why in found.reason
    assert "\n" not in found.reason
    machine.made.clear()
    assert machine.select(tmp_path) == found
    assert machine.made == ([] if kept else [("attention", 640)])


def test_nothing_of_the_check_s_settings_stays(tmp_path: Path) -> None:
    Machine().select(tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_stops_the_device(tmp_path: Path) -> None:
    machine = Machine(wrong={("attention", 640): _raises(RuntimeError("launch failed"))}, lost=True)
    with pytest.raises(FastdlpError, match=r"stopped the GPU \(.*illegal memory access was encountered\).*torch"):
        machine.select(tmp_path)


def test_a_measurement_is_kept(tmp_path: Path) -> None:
    first, second = Machine(), Machine(ms=dict.fromkeys(MS, (1.0, 9.0)))
    found = first.select(tmp_path)
    assert second.select(tmp_path) == found
    assert second.made == []
    assert second.select(tmp_path).reason.endswith("as measured before")


@pytest.mark.parametrize("part", IDENTITY)
def test_another_machine_measures_anew(part: str, tmp_path: Path) -> None:
    Machine().select(tmp_path)
    other = Machine()
    other.select(tmp_path, IDENTITY | {part: "another"})
    assert other.made == list(MS)
    assert len(list(tmp_path.iterdir())) == 2


def _edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | changes


DAMAGES: dict[str, Any] = {
    "no JSON": lambda content: None,
    "a list": lambda content: [content],
    "another format": _edited(format="x"),
    "another identity": _edited(identity=IDENTITY | {"driver": "2"}),
    "no choices": _edited(choices=None),
    "short": _edited(choices=[["attention"]]),
    "long": _edited(choices=[["attention", 640, "triton", "", ""]]),
    "an unknown backend": _edited(choices=[["attention", 640, "cuda", ""]]),
    "rows that are none": _edited(choices=[["attention", 0, "triton", ""]]),
    "rows in words": _edited(choices=[["attention", "640", "triton", ""]]),
    "rows as truth": _edited(choices=[["attention", True, "triton", ""]]),
    "a list for a name": _edited(choices=[[["attention"], 640, "triton", ""]]),
    "a number for a reason": _edited(choices=[["attention", 640, "triton", 1]]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_measured_anew(damage: Any, tmp_path: Path) -> None:
    found = Machine().select(tmp_path)
    (path,) = tmp_path.iterdir()
    content = damage(json.loads(path.read_text()))
    path.write_bytes(b"\x80\x04garbage" if content is None else json.dumps(content).encode())
    again = Machine()
    assert again.select(tmp_path) == found
    assert again.made == list(MS)
    assert Machine().select(tmp_path).seconds == 0


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert backends(Machine().select(tmp_path / "file" / "folder")) == ["triton", "torch", "torch"]


def test_the_budget(tmp_path: Path) -> None:
    """What is not reached takes torch, is said, and is all that the next run measures."""
    machine = Machine(ms=dict.fromkeys(MS, (2.0, 1.0)), seconds=40.0)
    found = machine.select(tmp_path)
    assert backends(found) == ["triton", "torch", "torch"]
    assert found.reason.count("not measured within 60 s") == 2
    again = Machine(ms=machine.ms)
    assert backends(again.select(tmp_path)) == ["triton"] * 3
    assert again.made == list(MS)[1:]


# -- as a value of --backend --------------------------------------------------------------------------------

MIXED = Selection((Choice("attention", 640, "triton"), Choice("mlp", 640, "torch"), Choice("optimizer", 3, "triton")))


def test_written_and_read() -> None:
    assert str(MIXED) == "attention@640=triton,mlp@640=torch,optimizer@3=triton"
    assert read_backend(str(MIXED)) == MIXED
    one = Selection((Choice("mlp", 3, "triton", "why"), Choice("mlp", 9, "triton")))
    assert (str(one), read_backend(str(one))) == ("triton", "triton")
    assert [backend_of(b, "mlp", 640) for b in ("triton", MIXED)] == ["triton", "torch"]
    TrainConfig(backend=str(MIXED)).check()
    for bad in ("fast", "mlp@0=torch", "mlp@3=cuda", "mlp@3=torch,", "mlp@3=torch\n", "auto,mlp@3=torch"):
        with pytest.raises(FastdlpError, match=r"unknown --backend .*: choose from auto, triton, torch"):
            TrainConfig(backend=bad).check()


def test_a_recorded_selection_needs_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = torch.device("cpu")
    assert pick_backend(str(MIXED), cpu, torch.float32, 18) == MIXED
    with pytest.raises(FastdlpError, match="64 ranks"):
        pick_backend(str(MIXED), cpu, torch.float32, 65)


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA GPU that Triton runs on and that has no measured table; never a CPU."""
    known = [False]
    monkeypatch.setattr(tiles, "measured", lambda device, itemsize: known[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert must_measure("auto", GPU, torch.bfloat16, 18)
    assert not must_measure("torch", GPU, torch.bfloat16, 18)
    assert not must_measure("triton", GPU, torch.bfloat16, 18)
    assert not must_measure("auto", torch.device("cpu"), torch.float32, 18)
    assert not must_measure("auto", GPU, torch.bfloat16, 65)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not must_measure("auto", GPU, torch.bfloat16, 18)
    known[0] = True
    assert not must_measure("auto", GPU, torch.bfloat16, 18)
    monkeypatch.setattr(kernels_backend, "_installed", lambda: False)
    assert not must_measure("auto", GPU, torch.bfloat16, 18)


def test_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    whole = cuda_identity(GPU, torch.bfloat16, "s")
    assert whole.keys() == IDENTITY.keys() | {"fastdlp"}
    assert all(isinstance(value, str) and value for value in whole.values())
    assert cuda_identity(GPU, torch.float32, "s")["dtype"] != whole["dtype"]


@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
def test_tolerance(precision: str) -> None:
    assert tolerance_of(torch.float32) == TOLERANCE[torch.float16 if precision == "tf32" else torch.float32]
    assert tolerance_of(torch.bfloat16) == TOLERANCE[torch.bfloat16]


def test_processes_agree() -> None:
    class Faked(ProcessGroup):
        def all_gather(self, value: Any) -> list[Any]:
            return [["triton"], value]

    class Failed(ProcessGroup):
        def all_gather(self, value: Any) -> list[Any]:
            return ["no room", value]

    assert ProcessGroup().broadcast_from_rank_zero("torch") == "torch"
    assert Faked(1, 2).broadcast_from_rank_zero("torch") == "triton"
    with pytest.raises(FastdlpError, match="no room"):
        Failed(1, 2).broadcast_from_rank_zero("torch")


# -- the units of a run -------------------------------------------------------------------------------------

LOCAL, GLOBAL = (("local",),), (("global",),)


def test_passes() -> None:
    load = Load(clients=10, rows=32, scored=100, micro_batch=300, padded=True)
    full = [Pass(8, 32, LOCAL), Pass(8, 32, GLOBAL)]
    alone = [Pass(1, 32, LOCAL), Pass(1, 32, GLOBAL)]
    assert passes(make_method(TrainConfig()), load) == [full, [Pass(3, 100, LOCAL, False)], alone]
    assert passes(make_method(TrainConfig()), replace(load, padded=False))[0][0].clients == 9
    both = passes(make_method(TrainConfig(teacher="pre-update")), load)
    assert both[0] == [Pass(8, 32, (("local",), ("global",)))]
    one = Load(clients=1, rows=32, scored=32, micro_batch=1, padded=True)
    assert passes(make_method(TrainConfig()), one) == [alone]
    for name in METHODS:
        assert passes(make_method(TrainConfig(method=name)), load), name


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_clip(tiny_clip(tmp_path_factory.mktemp("model"), quick_gelu=True))


def all_units(towers: Any, encoder: str) -> Iterator[Unit]:
    method, load = make_method(TrainConfig()), Load(2, 3, 3, 12, False)
    own = towers.tower(encoder).to("cpu", torch.float32)
    bank = AdapterBank(tower_sites(own.shape), method.branches(), 3)
    three = torch.full((3,), 0.1)
    yield from [u for u in tower_units(own, method, 5, load) if u.rows == 6]
    yield optimizer_unit(bank, Hyperparameters(three, three, three, three, clip_norm=0.5, weight_decay=0.1), 2)


def run_here(some: list[Unit], cache: Path) -> Selection:
    """With Triton's interpreter, whose time is called the shorter one."""
    meter = Meter(lambda call: 1.0 if call.args[0] == "triton" else 2.0)  # type: ignore[attr-defined]
    return select(some, IDENTITY, TOLERANCE[torch.float32], meter, cache, 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
@pytest.mark.parametrize("encoder", ["image", pytest.param("text", marks=pytest.mark.slow)])
def test_units_of_a_tower(encoder: str, towers: Any, tmp_path: Path) -> None:
    """Every unit runs both backends on its own, and finds them equal."""
    found = run_here(list(all_units(towers, encoder)), tmp_path)
    assert [choice.unit for choice in found.choices] == ["attention", "mlp", "last", "projection", "optimizer"]
    assert str(found) == "triton", found.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
@pytest.mark.slow
def test_a_wrong_kernel_is_found(towers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of every product without its adapter, as from a tile that ends too early."""
    from fastdlp.kernels import half_blocks

    whole = half_blocks.forward_product

    def short(x: Tensor, linear: Any, P: Tensor, *args: Any, **options: Any) -> Any:
        P = torch.cat([P[:-1], torch.zeros_like(P[-1:])])
        return whole(x, linear, P, *args, **options)

    monkeypatch.setattr(half_blocks, "forward_product", short)
    found = run_here(list(all_units(towers, "image"))[:-1], tmp_path)
    assert str(found) == "torch"
    assert found.reason.count("Triton's result is off by") == 4


@pytest.mark.parametrize("name", ["attention", "mlp", "last", "projection"])
def test_the_tower_asks_for_every_unit(name: str, towers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the answer holds for the linears of that unit, and for those alone; sites are numbered in forward order."""
    sites: dict[str, list[int]] = {"torch": [], "triton": []}
    for backend, where in (("torch", "site"), ("triton", "span")):
        whole = getattr(Adapters, where)

        def spied(self: Adapters, index: int, *args: Any, backend: str = backend, whole: Any = whole) -> Any:
            sites[backend].append(index)
            return whole(self, index, *args)

        monkeypatch.setattr(Adapters, where, spied)
    chosen = replace(towers.image, backend=Selection((Choice(name, 4, "triton"),)))
    bank = AdapterBank(tower_sites(chosen.shape), make_method(TrainConfig()).branches(), 1)
    adapters = bank.adapters(torch.tensor([0]), LOCAL, False)
    chosen.features(torch.zeros(4, 5, chosen.shape.width), RowGroups((4,)), adapters)
    own = {"attention": [0, 1], "mlp": [2, 3], "last": [4, 4, 5, 6, 7], "projection": [8]}
    assert sites["triton"] == own.pop(name)
    assert sites["torch"] == [site for unit in own.values() for site in unit]


# -- a run --------------------------------------------------------------------------------------------------


def test_a_cpu_measures_nothing(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engine, "measured", lambda *args: pytest.fail("measured on a CPU"))
    notices: list[str] = []
    train(
        TrainConfig(partition=str(few), rounds=1, out=str(tmp_path / "run")), callbacks=Callbacks(notice=notices.append)
    )
    config = RunFolder(tmp_path / "run").config()
    assert (config.backend, config.cuda_graph, notices) == ("torch", False, [])
    assert not list(cache_root().glob("backends-*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
@pytest.mark.parametrize("method", ["feddlp", "fedclip"])
def test_a_run_measures_its_own_units(method: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer, which comes first, within a budget that ends there; without LoRA nothing is."""
    machine = Machine(seconds=25.0)
    meter = Meter(lambda call: 1.0 if call.args[0] == "triton" else 2.0, machine.clock)  # type: ignore[attr-defined]
    monkeypatch.setenv("FASTDLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_engine, "must_measure", lambda name, *args: name == "auto")
    monkeypatch.setattr(units, "cuda_meter", lambda device: meter)
    monkeypatch.setattr(units, "cuda_identity", lambda device, dtype, setting: IDENTITY | {"setting": setting})
    notices: list[str] = []
    config = TrainConfig(method=method, partition=str(few), out=str(tmp_path / "run"))
    made = prepare(config, Callbacks(notice=notices.append))
    chosen = read_backend(made.config.backend)
    if method == "fedclip":
        assert (chosen, notices) == ("torch", [])
        return
    assert isinstance(chosen, Selection)
    assert [(c.unit, c.rows) for c in chosen.choices if c.backend == "triton"] == [("optimizer", 3)]
    assert {c.rows for c in chosen.choices if c.unit == "attention"} == {96, 32, 12}  # 3 × 32, 1 × 32, 3 × 4 scored
    assert made.engine.bank.backend == "triton"
    assert made.engine.task.tower.backend == chosen  # type: ignore[attr-defined]
    assert notices[0].startswith(
        "--backend auto: optimizer of 3 rows triton (1 ms against 2); attention of 96 rows torch"
    )
    assert [path.name[:9] for path in (tmp_path / "cache").glob("backends-*")] == ["backends-"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
def test_a_run_keeps_its_selection(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_run: Callable[[Path, Path], None]
) -> None:
    """Reported and in the config; a resumed run takes the same backends without measuring; scores need none."""
    from fastdlp.export.evaluate import evaluate

    model = tiny_clip(tmp_path / "model", vision={"width": 16, "head_width": 8}, quick_gelu=True)
    config = TrainConfig(partition=str(few), model=model, rounds=2, lr=1e-3)
    monkeypatch.setattr(build_engine, "must_measure", lambda name, *args: name == "auto")
    monkeypatch.setattr(build_engine, "measured", lambda *args: MIXED)
    notices: list[str] = []
    train(replace(config, out=str(tmp_path / "a")), callbacks=Callbacks(notice=notices.append))
    assert notices == [f"--backend auto: {MIXED.reason}"]
    assert RunFolder(tmp_path / "a").config().backend == str(MIXED)

    train(replace(config, rounds=1, out=str(tmp_path / "b")))
    monkeypatch.setattr(build_engine, "measured", lambda *args: pytest.fail("measured again"))
    resume(tmp_path / "b", rounds=2)
    same_run(tmp_path / "a", tmp_path / "b")
    assert evaluate(tmp_path / "a")["accuracy"] >= 0
