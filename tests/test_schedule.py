"""Who steps together: everyone's batches in their order, in few steps, and how the device learns of them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastdlp.engine.schedule import Inputs, Shape, StepPlan, assemble_steps, graph_width, prefetch

RAGGED = {3: 100, 0: 1, 7: 31, 2: 32, 5: 33, 9: 64}


def queues(sizes: dict[int, int], size: int = 32, epochs: int = 1) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {}
    for slot, n in sizes.items():
        samples = 1000 * slot + np.arange(n)
        found[slot] = [samples[at : at + size] for _ in range(epochs) for at in range(0, n, size)]
    return found


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("max_rows", [1, 40, 100, 10_000])
def test_every_batch_once_and_in_its_order(max_rows: int, padded: bool, epochs: int) -> None:
    asked = queues(RAGGED, epochs=epochs)
    steps = assemble_steps(asked, 32, max_rows, lambda samples: samples, padded)
    taken: dict[int, list[np.ndarray]] = {slot: [] for slot in asked}
    for step in steps:
        slots = [slot for slot, _ in step]
        assert len(set(slots)) == len(slots)
        lengths = [len(samples) for _, samples in step]
        assert lengths == sorted(lengths, reverse=True)
        assert len(step) == 1 or sum([32] * len(step) if padded else lengths) <= max_rows
        for slot, samples in step:
            taken[slot].append(samples)
    for slot, batches in asked.items():
        assert len(taken[slot]) == len(batches)
        assert all(mine is theirs for mine, theirs in zip(taken[slot], batches))


def test_as_few_steps_as_the_longest_client_has() -> None:
    skewed = {0: 70 * 32 + 5} | {client: 3 * 32 + client for client in range(1, 10)}
    steps = assemble_steps(queues(skewed), 32, 10_000, lambda samples: samples)
    assert len(steps) == 71
    assert [len(step) for step in steps] == [10, 10, 10, *[1] * 67, 10]  # the last batches of all wait for each other


def test_last_batches_of_two_epochs_wait_too() -> None:
    steps = assemble_steps(queues({0: 70, 1: 40, 2: 9}, epochs=2), 32, 10_000, lambda samples: samples)
    assert [[len(samples) for _, samples in step] for step in steps] == [
        [32, 32],
        [32],
        [9, 8, 6],
        [32, 32],
        [32],
        [9, 8, 6],
    ]


def test_with_little_room_the_longest_goes_first() -> None:
    steps = assemble_steps(queues({0: 32, 1: 96, 2: 64}), 32, 32, lambda samples: samples)
    assert [step[0][0] for step in steps] == [1, 1, 2, 0, 1, 2]


def test_widths() -> None:
    widths = [1, 2, 3, 4, 5, 6, 7, 8, 8, 10, 10, 12, 12, 14, 14, 16, 16, 16, 16, 20]
    assert [graph_width(n) for n in range(1, 21)] == widths
    for n in range(1, 2000):
        assert 0.8 * n < graph_width(n) <= n
    assert len({graph_width(n) for n in range(1, 1001)}) <= 36


def test_padded_steps_have_few_shapes() -> None:
    sizes = {client: 37 * client + 1 for client in range(25)}
    steps = assemble_steps(queues(sizes), 32, 10_000, lambda samples: samples, padded=True)
    plan = StepPlan(steps, lambda slot: slot, torch.device("cpu"), 32)
    assert {shape.samples for shape in plan.shapes} == {32}
    assert all(len(shape.sizes) == graph_width(len(shape.sizes)) for shape in plan.shapes)
    assert plan.samples == sum(sizes.values())
    assert plan.computed == 32 * sum(len(step) for step in plan.steps)


@pytest.mark.parametrize("padded_to", [None, 32])
def test_inputs(padded_to: int | None) -> None:
    steps = [[(4, np.array([7, 8, 9])), (1, np.array([5]))], [(2, np.array([3, 1]))]]
    plan = StepPlan(steps, lambda slot: 10 + slot, torch.device("cpu"), padded_to)
    for number, (buffer, shape, step) in enumerate(zip(plan.buffers, plan.shapes, steps)):
        assert shape == Shape.of(step, padded_to)
        assert shape.sizes == tuple(padded_to or len(samples) for _, samples in step)
        inputs = Inputs.unpack(buffer, shape)
        assert inputs.slots.tolist() == [10 + slot for slot, _ in step]
        assert inputs.counts.tolist() == [len(samples) for _, samples in step]
        assert inputs.ids.flatten().tolist() == plan.ids(number).tolist()
        for row, (_, samples) in zip(inputs.ids.tolist(), step):
            assert row[: len(samples)] == samples.tolist()
            assert set(row[len(samples) :]) <= {int(samples[0])}  # padding shows no slot another's sample


def test_a_plan_of_nothing() -> None:
    plan = StepPlan([], lambda slot: slot, torch.device("cpu"))
    assert (len(plan), plan.samples, plan.computed) == (0, 0, 0)


def test_ahead_is_one_item_ahead_and_in_order() -> None:
    started: list[int] = []
    second = threading.Event()

    def double(item: int) -> int:
        started.append(item)
        if item == 1:
            second.set()
        return 2 * item

    results = prefetch(double, range(4))
    assert next(results) == 0
    assert second.wait(10)  # item 1 runs while its caller still works with item 0
    assert list(results) == [2, 4, 6]
    assert started == [0, 1, 2, 3]


def test_ahead_passes_errors_on() -> None:
    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(prefetch(fail, range(3)))
