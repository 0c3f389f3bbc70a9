"""Validation samples and shots: how many, whose, always the same ones, and never a test sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdlp.config import TrainConfig
from fastdlp.data.partition import Partition, hold_out, keep_shots, make_partition
from fastdlp.data.partition_file import load_partition, save_partition
from fastdlp.errors import FastdlpError

CLASSES = 7
LABELS = np.random.default_rng(0).integers(0, CLASSES, 400)
IDS = [f"sample/{i:03d}" for i in range(len(LABELS))]


def _partition(seed: int = 3) -> Partition:
    return make_partition(LABELS, TrainConfig(clients=6, beta=0.5, partition_seed=seed))


def _sized(*sizes: int, seed: int = 3) -> Partition:
    """Clients of so many training samples and one test sample each."""
    train, test, at = [], [], 0
    for size in sizes:
        train.append(np.arange(at, at + size))
        test.append(np.array([at + size]))
        at += size + 1
    return Partition(train, test, "file", None, None, seed, 0.25)


def _same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return [samples.tolist() for samples in one] == [samples.tolist() for samples in other]


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.99])
def test_sizes_of_validation(fraction: float) -> None:
    """A share rounded down, at least one of two or more, and something is left to train on."""
    sizes = (0, 1, 2, 3, 10, 41)
    held = hold_out(_sized(*sizes), fraction)
    expected = [0 if size < 2 else max(1, int(np.floor(size * fraction))) for size in sizes]
    assert [len(val) for val in held.val] == expected
    assert [len(train) for train in held.train] == [size - val for size, val in zip(sizes, expected)]
    assert all(len(train) for train, size in zip(held.train, sizes) if size)


def test_validation_comes_out_of_training_and_nothing_else_changes() -> None:
    partition = _partition()
    before = [samples.copy() for samples in partition.train]
    held = hold_out(partition, 0.3)
    assert _same(held.test, partition.test)
    for train, val, whole in zip(held.train, held.val, partition.train):
        assert np.array_equal(np.sort(np.concatenate([train, val])), whole)
        assert not set(train) & set(val)
        assert np.array_equal(np.sort(train), train)
        assert np.array_equal(np.sort(val), val)
    assert _same(partition.train, before)
    assert partition.val == []
    assert replace(held, train=partition.train, val=[]).__dict__ == partition.__dict__


def test_validation_is_drawn_at_random_from_the_partition_s_seed() -> None:
    one, again, other = (hold_out(_sized(60, 60, seed=seed), 0.5) for seed in (3, 3, 4))
    assert _same(one.val, again.val)
    assert not _same(one.val, other.val)
    assert one.val[0].tolist() != list(range(30))  # neither the first ones
    assert one.val[0].tolist() != (one.val[1] - 61).tolist()  # nor the same of every client


def test_a_client_s_validation_does_not_depend_on_the_others() -> None:
    partition = _partition()
    whole = hold_out(partition, 0.3)
    three = hold_out(replace(partition, train=partition.train[:3], test=partition.test[:3]), 0.3)
    assert _same(three.val, whole.val[:3])
    smaller = [partition.train[0], partition.train[1][:4], *partition.train[2:]]
    assert _same(hold_out(replace(partition, train=smaller), 0.3).val[2:], whole.val[2:])


def test_validation_is_held_out_once() -> None:
    with pytest.raises(FastdlpError, match="names validation samples: leave out --val-fraction"):
        hold_out(hold_out(_partition(), 0.3), 0.3)


@pytest.mark.parametrize("shots", [1, 4, 16, 10_000])
def test_sizes_of_shots(shots: int) -> None:
    """So many of each class over all clients together, and all where there are fewer."""
    partition = _partition()
    few = keep_shots(partition, LABELS, shots)
    there = np.bincount(LABELS[np.concatenate(partition.train)], minlength=CLASSES)
    kept = np.bincount(LABELS[np.concatenate(few.train)], minlength=CLASSES)
    assert kept.tolist() == np.minimum(there, shots).tolist()
    assert 4 < there.min() < 10_000
    assert few.clients == partition.clients


def test_shots_stay_with_their_client() -> None:
    partition = _partition()
    before = [samples.copy() for samples in partition.train]
    few = keep_shots(partition, LABELS, 4)
    for kept, whole in zip(few.train, partition.train):
        assert set(kept) <= set(whole)
        assert np.array_equal(np.sort(kept), kept)
    assert _same(few.test, partition.test)
    assert _same(partition.train, before)
    assert replace(few, train=partition.train).__dict__ == partition.__dict__
    with_val = hold_out(partition, 0.3)
    assert _same(keep_shots(with_val, LABELS, 4).val, with_val.val)


def test_shots_are_drawn_at_random_from_the_partition_s_seed() -> None:
    partition = _partition()
    one, again = (keep_shots(partition, LABELS, 4) for _ in range(2))
    other = keep_shots(replace(partition, seed=4), LABELS, 4)
    assert _same(one.train, again.train)
    assert not _same(one.train, other.train)
    first = [np.sort(np.concatenate(partition.train)[LABELS[np.concatenate(partition.train)] == c])[:4] for c in (0, 1)]
    chosen = np.sort(np.concatenate(one.train))
    assert not all(set(samples) <= set(chosen) for samples in first)


def test_a_class_s_shots_depend_neither_on_who_holds_them_nor_on_other_classes() -> None:
    partition = _partition()
    chosen = set(np.concatenate(keep_shots(partition, LABELS, 4).train))
    pooled = replace(partition, train=[np.sort(np.concatenate(partition.train))], test=partition.test[:1])
    assert set(keep_shots(pooled, LABELS, 4).train[0]) == chosen
    without = replace(partition, train=[samples[LABELS[samples] != 2] for samples in partition.train])
    assert set(np.concatenate(keep_shots(without, LABELS, 4).train)) == {i for i in chosen if LABELS[i] != 2}


def test_clients_of_no_and_of_one_sample() -> None:
    partition = _sized(0, 1, 30)
    assert [len(train) for train in keep_shots(partition, LABELS, 10_000).train] == [0, 1, 30]
    few = keep_shots(partition, np.zeros_like(LABELS), 3)
    assert sum(len(train) for train in few.train) == 3
    assert few.clients == 3
    assert len(few.train[0]) == 0


def test_written_down_and_read_back(tmp_path: Path) -> None:
    partition = keep_shots(hold_out(replace(_partition(), dataset="d"), 0.3), LABELS, 4)
    save_partition(tmp_path / "p.json", partition, IDS)
    again = load_partition(tmp_path / "p.json", IDS, "d")
    for side in ("train", "test", "val"):
        assert _same(getattr(again, side), getattr(partition, side))
    assert (again.seed, again.beta, again.scheme, again.draws) == (
        partition.seed,
        partition.beta,
        partition.scheme,
        partition.draws,
    )
    shuffled = IDS[::-1]  # ids, not numbers, are what is written
    last = load_partition(tmp_path / "p.json", shuffled, "d")
    assert [sorted(shuffled[i] for i in val) for val in last.val] == [[IDS[i] for i in val] for val in partition.val]


def test_without_validation_the_file_says_nothing_of_it(tmp_path: Path) -> None:
    save_partition(tmp_path / "p.json", _partition(), IDS)
    assert '"val"' not in (tmp_path / "p.json").read_text()
    assert load_partition(tmp_path / "p.json", IDS).val == []


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ('["sample/000"]', "more than once"),
        ('["sample/999"]', "does not have"),
        ('"sample/002"', "lists of ids"),
        ("[2]", "lists of ids"),
        ("null", "lists of ids"),
    ],
)
def test_validation_that_cannot_be(val: str, message: str, tmp_path: Path) -> None:
    head = '{"format": "fastdlp-partition", "version": 1, "clients": {"0": '
    path = tmp_path / "p.json"
    path.write_text(head + f'{{"train": ["sample/000"], "test": ["sample/001"], "val": {val}}}}}}}')
    with pytest.raises(FastdlpError, match=message):
        load_partition(path, IDS)
