"""Partitions: every sample once, the same every time, for every legal argument; files that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdlp.config import TrainConfig
from fastdlp.data.partition import SCHEMES, Partition, counts, dirichlet_proportions, make_partition
from fastdlp.data.partition_file import load_partition, partition_of, save_partition
from fastdlp.errors import FastdlpError

LABELS = np.arange(300) % 7
IDS = [f"s/{i}" for i in range(len(LABELS))]


def _made(labels: np.ndarray = LABELS, **options: Any) -> Partition:
    return make_partition(labels, TrainConfig(**options))


def _check_complete(partition: Partition, samples: int) -> None:
    """Every sample exactly once; sorted; the documented test share."""
    used = np.concatenate(partition.train + partition.test)
    assert np.array_equal(np.sort(used), np.arange(samples))
    for train, test in zip(partition.train, partition.test):
        assert train.dtype == test.dtype == np.int64
        assert np.all(np.diff(train) > 0)
        assert np.all(np.diff(test) > 0)
        n = len(train) + len(test)
        assert len(test) == (max(int(n * partition.test_fraction), 1) if n >= 2 else 0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clients", [1, 4, 50, 300])
@pytest.mark.parametrize("fraction", [0.25, 0.01, 0.99])
def test_every_sample_is_used_once(scheme: str, clients: int, fraction: float) -> None:
    partition = _made(clients=clients, partition=scheme, classes_per_client=7, test_fraction=fraction)
    assert partition.clients == clients
    _check_complete(partition, len(LABELS))


@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-12, 0.001, 0.01, 0.999, 1, 10, 1e6, 1e300, 1.7e308])
@pytest.mark.parametrize("clients", [1, 10, 200])
def test_dirichlet_ends_at_every_beta(beta: float, clients: int) -> None:
    with np.errstate(all="raise", under="ignore", over="ignore"):
        partition = _made(clients=clients, beta=beta)
    _check_complete(partition, len(LABELS))
    held = counts(partition, LABELS).sum(axis=2)
    if beta <= 1e-12:
        assert np.all((held > 0).sum(axis=0) == 1)  # the limit: each class with one client
    if beta >= 1e6:
        assert held.sum(axis=1).max() - held.sum(axis=1).min() <= 7  # the other limit: even


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0, 3.0])
def test_shares_have_the_moments_of_dirichlet(beta: float) -> None:
    rng = np.random.default_rng(0)
    shares = np.array([dirichlet_proportions(rng, 4, beta) for _ in range(20_000)])
    assert np.allclose(shares.sum(axis=1), 1)
    assert np.allclose(shares.mean(axis=0), 1 / 4, atol=0.015)
    variance = (1 / 4) * (3 / 4) / (4 * beta + 1)
    assert np.allclose(shares.var(axis=0), variance, rtol=0.05)
    assert np.isclose(np.cov(shares[:, 0], shares[:, 1])[0, 1], -variance / 3, rtol=0.1)


def test_no_client_collects_the_remainders() -> None:
    labels = np.repeat(np.arange(200), 30)
    held = (counts(_made(labels, clients=10, beta=0.05), labels).sum(axis=2) > 0).sum(axis=1)
    assert held[-1] < 2 * np.median(held)


def test_iid_sizes_differ_by_one_at_most() -> None:
    partition = _made(clients=7, partition="iid")
    sizes = [len(train) + len(test) for train, test in zip(partition.train, partition.test)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("clients", "each"), [(10, 2), (4, 2), (7, 1), (3, 5), (1, 7), (40, 3)])
def test_pathological_deals_k_classes_and_every_class(clients: int, each: int) -> None:
    for seed in range(5):
        partition = _made(clients=clients, partition="pathological", classes_per_client=each, partition_seed=seed)
        _check_complete(partition, len(LABELS))
        held = counts(partition, LABELS).sum(axis=2) > 0
        assert np.all(held.sum(axis=1) == each)
        holders = held.sum(axis=0)
        assert holders.min() >= 1
        assert holders.max() - holders.min() <= 1


def test_the_same_arguments_give_the_same_partition() -> None:
    golden = {
        "dirichlet": [[0, 2, 5, 8, 18, 20], [3, 6, 15, 21], [1, 7, 10, 11, 13, 14, 16, 17, 19]],
        "iid": [[3, 4, 10, 12, 14, 18], [6, 7, 8, 13, 17, 19], [2, 5, 11, 16, 21, 23]],
        "pathological": [[0, 5, 11, 12, 15, 23], [2, 8, 10, 13, 17, 20], [4, 6, 9, 16, 19, 22]],
    }
    for scheme, train in golden.items():
        np.random.seed(len(scheme))  # noqa: NPY002 - the global state must not matter
        partition = _made(np.arange(24) % 3, clients=3, partition=scheme, beta=0.5, partition_seed=7)
        assert [samples.tolist() for samples in partition.train] == train
        other = _made(np.arange(24) % 3, clients=3, partition=scheme, beta=0.5, partition_seed=8)
        assert [samples.tolist() for samples in other.train] != train


def test_tiny_clients() -> None:
    partition = _made(np.zeros(3, int), clients=2, partition="iid")
    assert [(len(a), len(b)) for a, b in zip(partition.train, partition.test)] == [(1, 1), (1, 0)]


def test_empty_clients_are_kept_refused_or_redrawn() -> None:
    arguments: dict[str, Any] = {"clients": 10, "beta": 0.02, "partition_seed": 3}
    kept = _made(**arguments)
    empty = [client for client in range(10) if len(kept.train[client]) == 0]
    assert empty
    assert kept.empty == empty
    with pytest.raises(FastdlpError, match=f"sample: {', '.join(map(str, empty))};"):
        _made(**arguments, empty_clients="refuse")
    with pytest.raises(FastdlpError, match="100 draws"):
        _made(clients=200, beta=1e-6, empty_clients="redraw")
    arguments["beta"] = 0.05
    assert _made(**arguments).empty
    redrawn = _made(**arguments, empty_clients="redraw")
    assert not redrawn.empty
    assert redrawn.draws > 1
    _check_complete(redrawn, len(LABELS))
    again = _made(**arguments, empty_clients="redraw")
    assert all(map(np.array_equal, redrawn.train, again.train))
    assert _made(clients=5, partition="iid", empty_clients="refuse").draws == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"beta": -1.0}, "greater than 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": float("inf")}, "finite"),
        ({"clients": 0}, "clients is 0"),
        ({"clients": 301}, "301 clients for 300 samples"),
        ({"partition": "sharded"}, "dirichlet, iid, pathological"),
        ({"partition": "pathological", "classes_per_client": 0}, "at least 1"),
        ({"partition": "pathological", "classes_per_client": 8}, "use 1 to 7"),
        (
            {"partition": "pathological", "clients": 3},
            "at most 6 of the 7 classes: use at least 3 .* or 4 clients",
        ),
        ({"partition_seed": -1}, "partition-seed is -1"),
        ({"test_fraction": 0.0}, "test-fraction is 0.0"),
        ({"test_fraction": 1.0}, "test-fraction is 1.0"),
        ({"test_fraction": float("nan")}, "test-fraction is nan"),
        ({"empty_clients": "drop"}, "keep, refuse, redraw"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """The config refuses what no data allow, the partition what these data do not have."""

    def make() -> None:
        config = TrainConfig(**arguments)
        config.check()
        partition_of(config, LABELS, IDS, "toy")

    with pytest.raises(FastdlpError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_counts() -> None:
    partition = Partition(
        train=[np.array([0, 1]), np.array([3])],
        test=[np.array([2]), np.array([], np.int64)],
        scheme="iid",
        beta=None,
        classes_per_client=None,
        seed=0,
        test_fraction=0.25,
    )
    table = counts(partition, np.array([0, 0, 2, 2]), classes=4)
    assert table.tolist() == [
        [[2, 0], [0, 0], [0, 1], [0, 0]],
        [[0, 0], [0, 0], [1, 0], [0, 0]],
    ]
    assert counts(partition, np.array([0, 0, 2, 2])).shape == (2, 3, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_comes_back_on_other_indices(tmp_path: Path, scheme: str) -> None:
    names = [f'odd "{i}" \\ β\udcff' for i in range(300)]  # the last is how Python reads a name that is no UTF-8
    made = make_partition(LABELS, TrainConfig(clients=12, partition=scheme, beta=0.05, partition_seed=5), "toy", "f00")
    save_partition(tmp_path / "p.json", made, names)
    reordered = ["unused", *reversed(names)]
    read = load_partition(tmp_path / "p.json", reordered, "toy")
    for before, after in zip(made.train + made.test, read.train + read.test):
        assert {names[i] for i in before} == {reordered[i] for i in after}
        assert after.dtype == np.int64
        assert np.all(np.diff(after) > 0)
    for field in (
        "scheme",
        "beta",
        "classes_per_client",
        "seed",
        "test_fraction",
        "draws",
        "dataset",
        "fingerprint",
    ):
        assert getattr(read, field) == getattr(made, field), field
    assert read.empty == made.empty


def test_a_file_written_by_hand_needs_only_the_clients(tmp_path: Path) -> None:
    text = json.dumps(
        {"format": "fastdlp-partition", "version": 1, "clients": {"north": {"train": ["s/2"], "test": []}}}
    )
    (tmp_path / "p.json").write_text(text)
    read = load_partition(tmp_path / "p.json", IDS)
    assert [samples.tolist() for samples in read.train] == [[2]]
    assert read.scheme == "file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a partition file"),
        ({"version": 2}, "version 2; this fastdlp reads 1"),
        ({"clients": {}}, "names no client"),
        ({"clients": None}, "names no client"),
        ({"clients": {"0": {"train": ["s/1"]}}}, "client '0' lacks the lists"),
        ({"clients": {"0": {"train": [1], "test": []}}}, "client '0' lacks the lists"),
        ({"clients": {"0": {"train": [], "test": ["s/1"]}}}, "no client has a training sample"),
        ({"clients": {"0": {"train": ["s/1"], "test": ["s/1"]}}}, "'s/1' more than once"),
        (
            {"clients": {"0": {"train": ["s/1", "x", "y"], "test": ["z"]}}},
            "the data set toy does not have: 'x' and 2 more; its data set is 'pets'",
        ),
        ({"seed": "one"}, "field 'seed' is 'one'"),
        ({"beta": True}, "field 'beta' is True"),
    ],
)
def test_bad_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_partition(tmp_path / "p.json", make_partition(LABELS, TrainConfig(), "pets"), IDS)
    document = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(FastdlpError, match=message):
        load_partition(tmp_path / "p.json", IDS, "toy")


def test_a_file_that_is_no_partition(tmp_path: Path) -> None:
    with pytest.raises(FastdlpError, match="cannot read the partition file"):
        load_partition(tmp_path / "none.json", IDS)
    for text, message in (("{", "is not JSON"), ("[]", "not a partition file")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(FastdlpError, match=message):
            load_partition(tmp_path / "p.json", IDS)
