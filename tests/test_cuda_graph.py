"""Whether steps go on as graphs: the first replay of every shape decides, and a wrong result is never used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdlp.config import TrainConfig
from fastdlp.engine.cuda_graph import TOLERANCE, GraphedSteps
from fastdlp.engine.schedule import Inputs, Shape
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method
from fastdlp.run.build_engine import may_graph
from fastdlp.run.setup import prepare

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL, LARGE = Shape((2,), 2), Shape((2, 2), 2)


class Fake:
    """A recorder whose graph is the call itself, put through `wrong`."""

    def __init__(self, wrong: Callable[[Callable[[], Any]], Any] = lambda call: call()) -> None:
        self.wrong, self.recorded, self.replays = wrong, 0, 0

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1

        def replay() -> Any:
            self.replays += 1
            return self.wrong(call)

        return replay


class Toy:
    """Steps that change the rows of their slots, and those steps through graphs."""

    def __init__(self, recorder: Any, notice: Callable[[str], None] | None) -> None:
        self.state = torch.zeros(4, 3)
        self.run = GraphedSteps(self.step, recorder, lambda: [self.state], notice)

    def step(self, buffer: Tensor, shape: Shape, staged: Tensor | None) -> Tensor:
        inputs = Inputs.unpack(buffer, shape)
        self.state.index_add_(0, inputs.slots, inputs.ids.sum(1)[:, None].expand(-1, 3).float())
        return inputs.ids.sum(1).float()[None] + (0 if staged is None else staged.sum())


def buffer(*slots: int, first: int = 1) -> Tensor:
    ids = [n for slot in slots for n in (first + slot, first + slot + 1)]
    return torch.tensor([*slots, *(2 for _ in slots), *ids])


STEPS = [(buffer(0, first=first), SMALL) for first in (1, 5, 9, 2)] + [
    (buffer(1, 3, first=first), LARGE) for first in (3, 4, 7)
]


def results(recorder: Any, notice: Callable[[str], None] | None) -> tuple[list[Tensor], Tensor]:
    toy = Toy(recorder, notice)
    return [toy.run(w, shape, torch.tensor([0.5 * i])).clone() for i, (w, shape) in enumerate(STEPS)], toy.state


def assert_right(found: tuple[list[Tensor], Tensor], rtol: float = 0.0) -> None:
    plain = Toy(None, None)
    for i, (loss, (w, shape)) in enumerate(zip(found[0], STEPS)):
        assert torch.allclose(loss, plain.step(w, shape, torch.tensor([0.5 * i])), rtol=rtol, atol=0)
    assert torch.allclose(found[1], plain.state, rtol=rtol, atol=0)


def test_right_graphs_stay_on() -> None:
    recorder, notices = Fake(), list[str]()
    assert_right(results(recorder, notices.append))
    assert (recorder.recorded, recorder.replays, notices) == (2, 5, [])  # all but the first step of a shape


def test_rounding_is_no_error() -> None:
    recorder, notices = Fake(lambda call: call() * (1 + TOLERANCE / 2)), list[str]()
    assert_right(results(recorder, notices.append), rtol=TOLERANCE)
    assert (recorder.replays, notices) == (5, [])


def _raises(call: Callable[[], Any]) -> Any:
    raise RuntimeError("operation not permitted\nlong trace")


def _updates_twice(call: Callable[[], Any]) -> Any:
    call()
    return call()


WRONG: dict[str, tuple[Any, str]] = {
    "losses": (lambda call: call() * 1.5, "differs by 0.5"),
    "not finite": (lambda call: call() * float("nan"), "differs by nan"),
    "update twice": (_updates_twice, "differs by 1"),
    "no update": (lambda call: torch.tensor([[0.0]]), "differs by 1"),
    "replay raises": (_raises, "operation not permitted"),
}


@pytest.mark.parametrize(("wrong", "why"), WRONG.values(), ids=WRONG)
def test_a_wrong_graph_is_never_used(wrong: Any, why: str) -> None:
    recorder, notices = Fake(wrong), list[str]()
    assert_right(results(recorder, notices.append))
    assert (recorder.recorded, recorder.replays) == (1, 1)
    assert len(notices) == 1
    assert notices[0].startswith("without CUDA graphs: ")
    assert why in notices[0]
    assert "\n" not in notices[0]
    with pytest.raises(FastdlpError, match=f"{why}.*leave out --cuda-graph"):
        results(Fake(wrong), None)


def test_inputs_that_a_graph_holds_on_to_are_noticed() -> None:
    """The graph of a shape repeats what it first saw in that place."""
    stale: list[Any] = []

    class Stale(Fake):
        def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: stale[0]() if stale else call()

    notices: list[str] = []
    toy = Toy(Stale(), notices.append)
    stale.append(lambda: toy.step(STEPS[0][0], SMALL, torch.tensor([0.0])))
    for i, (w, shape) in enumerate(STEPS):
        toy.run(w, shape, torch.tensor([0.5 * i]))
    assert len(notices) == 1
    plain = Toy(None, None)
    for w, shape in STEPS:
        plain.step(w, shape, None)
    assert torch.equal(toy.state, plain.state)


def test_a_recording_that_fails() -> None:
    class Fails(Fake):
        def record(self, call: Callable[[], Any]) -> Any:
            try:
                raise torch.OutOfMemoryError("no room")
            finally:
                raise RuntimeError("capture was invalidated")

    notices: list[str] = []
    assert_right(results(Fails(), notices.append))
    assert notices == ["without CUDA graphs: no room"]


def test_a_later_shape_decides_too() -> None:
    wrong_shape = Fake(lambda call: (out := call()) * (1.0 if out.shape[1] == 1 else 2.0))
    notices: list[str] = []
    assert_right(results(wrong_shape, notices.append))
    assert (wrong_shape.replays, len(notices)) == (4, 1)


@pytest.mark.parametrize(("asked", "on"), [(None, True), (True, True), (False, False)])
def test_where_graphs_run(asked: bool | None, on: bool) -> None:
    adapters, whole = make_method(TrainConfig()), make_method(TrainConfig(method="fedfft"))
    assert may_graph(asked, adapters, CUDA) == on
    for method, device in ((adapters, CPU), (whole, CUDA)):
        if asked:
            with pytest.raises(FastdlpError, match="leave it out"):
                may_graph(asked, method, device)
        else:
            assert not may_graph(asked, method, device)


def test_a_run_whose_graphs_are_wrong(few: Path, tmp_path: Path) -> None:
    """A federation of the embedded model: the same bits as without graphs, whatever a wrong graph does."""
    config = TrainConfig(partition=str(few), batch_size=4, local_epochs=2, out=str(tmp_path))
    plain, graphed = (prepare(config).engine for _ in range(2))
    assert plain.run == plain._step
    notices: list[str] = []
    graphed.run = GraphedSteps(graphed._step, Fake(_updates_twice), graphed.bank.tensors, notices.append)
    for engine in (plain, graphed):
        engine.train_round(1)
    assert len(notices) == 1
    for one, other in zip(plain.bank.tensors(), graphed.bank.tensors()):
        assert torch.equal(one, other)
