"""Runs with validation samples and few shots: recorded and reported metrics, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fastdlp
from fastdlp.data import partition_file
from fastdlp.data.registry import load_source
from fastdlp.run.train import Callbacks, Stopped
from tests.conftest import CLI

ROUNDS = 8
# A learning rate that makes the last round, the best on test and the one that validation chooses three different ones.
OPTIONS: dict[str, Any] = {"method": "fedclip", "lr": 0.03, "seed": 1, "batch_size": 4, "val_fraction": 0.4}


def _run(few: Path, out: Path, callbacks: Callbacks | None = None, **options: Any) -> dict[str, Any]:
    settings = {"partition": str(few), "rounds": ROUNDS, "out": str(out)} | OPTIONS | options
    return fastdlp.train(fastdlp.TrainConfig(**settings), callbacks=callbacks)


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def last(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "last"
    _run(few, run)
    return run


@pytest.fixture(params=["last", "best", "validation"], scope="module")
def reported(
    request: pytest.FixtureRequest, few: Path, last: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The same run under every --report."""
    if request.param == "last":
        yield "last", last
        return
    run = tmp_path_factory.mktemp("runs") / request.param
    _run(few, run, report=request.param)
    yield request.param, run


def test_three_accuracies_are_always_separate(reported: tuple[str, Path]) -> None:
    """Of the first round of the highest accuracy, each computed from the counts in metrics.jsonl."""
    report, run = reported
    summary, lines = json.loads((run / "summary.json").read_text()), _lines(run)
    test = [sum(c["correct"] for c in line["clients"]) / sum(c["n"] for c in line["clients"]) for line in lines]
    val = [sum(c["val_correct"] for c in line["clients"]) / sum(c["val_n"] for c in line["clients"]) for line in lines]
    assert [line["accuracy"] for line in lines] == test
    assert [line["accuracy_val"] for line in lines] == val
    best, chosen = test.index(max(test)), val.index(max(val))
    assert len({best, chosen, ROUNDS - 1}) == len({test[best], test[chosen], test[-1]}) == 3
    assert summary["accuracy_last"] == test[-1]
    assert (summary["accuracy_best_test"], summary["round_best_test"]) == (test[best], best + 1)
    assert (summary["accuracy_chosen"], summary["round_chosen"]) == (test[chosen], chosen + 1)
    assert summary["accuracy_val_chosen"] == val[chosen]

    at = {"last": ROUNDS - 1, "best": best, "validation": chosen}[report]
    assert (summary["accuracy"], summary["accuracy_is"], summary["round_reported"]) == (test[at], report, at + 1)
    per = [client["correct"] / client["n"] for client in lines[at]["clients"]]
    assert summary["clients_lowest"] == min(per)
    assert summary["accuracy_mean_clients"] == pytest.approx(sum(per) / len(per))
    assert [c["correct"] for c in summary["per_client"]] == [c["correct"] for c in lines[at]["clients"]]


def test_the_report_decides_no_number(reported: tuple[str, Path], last: Path) -> None:
    _, run = reported
    assert [line | {"seconds": 0} for line in _lines(run)] == [line | {"seconds": 0} for line in _lines(last)]
    for file in sorted((last / "adapters").iterdir()):
        assert (run / "adapters" / file.name).read_bytes() == file.read_bytes()


def test_validation_takes_from_training_alone(few: Path, last: Path) -> None:
    given = json.loads(few.read_text())["clients"]
    record = json.loads((last / "partition.json").read_text())["clients"]
    for client, samples in record.items():
        assert samples["test"] == given[client]["test"]
        assert sorted(samples["train"] + samples["val"]) == given[client]["train"]
    assert [len(samples["val"]) for samples in record.values()] == [4, 2, 2]  # 0.4 of 12, 7 and 5, rounded down
    summary = json.loads((last / "summary.json").read_text())
    assert [client["n_train"] for client in summary["per_client"]] == [8, 5, 3]
    assert all(c["val_n"] == n for line in _lines(last) for c, n in zip(line["clients"], [4, 2, 2]))


def test_without_validation_none_is_chosen(few: Path, tmp_path: Path) -> None:
    summary = _run(few, tmp_path / "run", val_fraction=0.0, rounds=1)
    for name in ("accuracy_chosen", "round_chosen", "accuracy_val_chosen"):
        assert summary[name] is None
    (line,) = _lines(tmp_path / "run")
    assert "accuracy_val" not in line
    assert "val_n" not in line["clients"][0]


@pytest.fixture
def drawn_no_more(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After its call, drawing a partition, validation samples or shots fails: a resumed run reads its own record."""

    def refuse(*_: Any) -> None:
        raise AssertionError("drawn again")

    def forbid() -> None:
        for name in ("hold_out", "keep_shots", "make_partition"):
            monkeypatch.setattr(partition_file, name, refuse)

    return forbid


def test_continued_and_scored_from_the_record(
    few: Path,
    tmp_path: Path,
    same_run: Callable[[Path, Path], None],
    cli: CLI,
    drawn_no_more: Callable[[], None],
) -> None:
    options = {"shots": 1, "rounds": 3}
    whole = _run(few, tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        _run(few, tmp_path / "run", Callbacks(should_stop=lambda: True), **options)
    drawn_no_more()
    resumed = fastdlp.resume(tmp_path / "run")
    same_run(tmp_path / "run", tmp_path / "whole")
    assert resumed["accuracy_val_chosen"] == whole["accuracy_val_chosen"]
    code, out, err = cli("evaluate", tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["per_client"] == resumed["per_client"]


def test_few_shots_are_recorded(few: Path, tmp_path: Path) -> None:
    summary = _run(few, tmp_path / "run", rounds=1, shots=1, val_fraction=0.0)
    record = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    train = [sample for samples in record.values() for sample in samples["train"]]
    assert sum(client["n_train"] for client in summary["per_client"]) == len(train)
    given = json.loads(few.read_text())["clients"]
    assert all(samples["test"] == given[client]["test"] for client, samples in record.items())
    labels = load_source("digits", None, False)
    classes = [int(labels.labels[labels.ids.index(sample)]) for sample in train]
    everyone = [int(labels.labels[labels.ids.index(s)]) for samples in given.values() for s in samples["train"]]
    assert sorted(classes) == sorted(set(everyone))  # one of each class that anybody trains on


def test_a_recorded_partition_serves_another_run(few: Path, last: Path, tmp_path: Path) -> None:
    """--partition RUN/partition.json: the assignment of samples, validation included, without further options."""
    summary = _run(last / "partition.json", tmp_path / "run", val_fraction=0.0)
    before = json.loads((last / "summary.json").read_text())
    for name in ("accuracy_last", "accuracy_chosen", "round_chosen", "accuracy_val_chosen"):
        assert summary[name] == before[name]


def test_a_recorded_partition_s_validation_can_be_reported(last: Path, tmp_path: Path, cli: CLI) -> None:
    """The file has validation samples; --val-fraction beside it is refused, so --report must not ask for it."""
    options = ("--method", "fedclip", "--partition", last / "partition.json", "--rounds", 1, "--batch-size", 4)
    code, out, err = cli("train", *options, "--report", "validation", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy_is"] == "validation"


def _tiny(path: Path, train: int) -> Path:
    """A partition file of two clients of so many training samples."""
    names = [f"digits/{i:05d}" for i in range(2 * (train + 2))]
    clients = {}
    for client in range(2):
        own = names[client * (train + 2) :][: train + 2]
        clients[str(client)] = {"train": own[:train], "test": own[train:]}
    path.write_text(json.dumps({"format": "fastdlp-partition", "version": 1, "clients": clients}))
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--report", "validation"), "--report validation needs validation samples: pass --val-fraction"),
        (("--val-fraction", 1), "--val-fraction is 1.0"),
        (("--val-fraction=-0.1",), "--val-fraction is -0.1"),
        (("--val-fraction", "nan"), "--val-fraction is nan"),
        (("--shots", 0), "--shots is 0"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[object, ...], expected: str, few: Path, tmp_path: Path, cli: CLI
) -> None:
    code, out, err = cli("train", "--partition", few, "--out", tmp_path / "run", *options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_validation_and_val_fraction(last: Path, tmp_path: Path, cli: CLI) -> None:
    options = ("--partition", last / "partition.json", "--val-fraction", 0.1, "--out", tmp_path / "run")
    code, _out, err = cli("train", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "names validation samples: leave out --val-fraction" in err
    assert list(tmp_path.iterdir()) == []


def test_validation_that_holds_nobody(tmp_path: Path, cli: CLI) -> None:
    """Clients of one training sample have none to hold out: said before the rounds, not after them."""
    partition = _tiny(tmp_path / "p.json", 1)
    options = ("--partition", partition, "--val-fraction", 0.5, "--report", "validation", "--rounds", 1)
    code, _, err = cli("train", *options, "--out", tmp_path / "run", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "run").exists()


def test_shots_that_leave_a_client_without_samples(few: Path, tmp_path: Path, cli: CLI) -> None:
    options = ("--method", "flora", "--beta", 0.1, "--shots", 1, "--rounds", 1, "--quiet")
    code, _, err = cli("train", *options, "--empty-clients", "refuse", "--out", tmp_path / "refused")
    assert (code, err.count("\n")) == (2, 1)
    assert "have no training sample" in err
    assert not (tmp_path / "refused").exists()
    code, _, err = cli("train", *options, "--out", tmp_path / "kept")
    assert code == 0, err
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text())
    assert summary["empty_clients"]
    (line,) = _lines(tmp_path / "kept")
    for client in summary["empty_clients"]:
        assert line["clients"][client]["steps"] == line["clients"][client]["bytes_sent"] == 0
