"""The report shows what the run folders hold, needs nothing else, and says what it cannot show."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.report import curves, maps
from fastdlp.report.compare import check_comparable, differing_options, group_seeds
from fastdlp.report.read import read_runs
from fastdlp.report.style import look
from fastdlp.report.write import write_report

CLI = Callable[..., tuple[int, str, str]]
PARTS = ["0.q", "0.k", "1.q", "proj"]
BYTES = 2**19  # a client sends and receives so much a round
VOID = {"meta", "img", "line"}


def make_run(
    path: Path,
    *,
    rounds: int = 3,
    n: tuple[int, ...] = (10, 0, 4),
    classes: int = 2,
    finished: bool = True,
    validation: bool = False,
    recorded: bool = True,
    gated: bool = True,
    partition_seed: int = 0,
    **options: Any,
) -> Path:
    """A run folder as fastdlp train leaves it, without the training."""
    config = TrainConfig(rounds=rounds, clients=len(n), out=str(path), **options).resolved()
    draw = np.random.default_rng(config.seed)
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    members = {str(c): {"train": [], "test": [f"{partition_seed}-{c}-{i}" for i in range(n[c])]} for c in range(len(n))}
    head = {"format": "fastdlp-partition", "version": 1, "scheme": "dirichlet", "beta": 0.1, "fingerprint": "f0"}
    (path / "partition.json").write_text(json.dumps(head | {"seed": partition_seed, "clients": members}))
    lines = []
    for number in range(1, rounds + 1):
        correct = [int(draw.integers(0, size + 1)) for size in n]
        shares = {part: float(draw.random() * 0.5) for part in PARTS} if gated else {}
        line = {
            "round": number,
            "accuracy": sum(correct) / sum(n),
            "losses": {"ce_local": float(draw.random() + 0.1), "kd_local": None if number == 1 else 0.5 / number},
            "gates_zero_share": float(np.mean(list(shares.values()))) if gated else None,
            "gates_zero_by_part": shares,
            "clients": [
                {"client": c, "correct": correct[c], "n": n[c], "bytes_sent": BYTES, "bytes_received": BYTES}
                for c in range(len(n))
            ],
            "seconds": 1.5,
        }
        lines.append(line | ({"accuracy_val": 1 / number} if validation else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary: dict[str, Any] = {"rounds": rounds, "zero_shot": 0.25, "uploaded_parameters": 1234}
        summary["seconds_total"] = 75.4
        if validation:
            summary |= {"round_chosen": 1, "accuracy_chosen": lines[0]["accuracy"]}
        if recorded:
            held = np.array([np.bincount(np.arange(size) % classes, minlength=classes) for size in n])
            names = [f"<i>class</i> ${i}_$" for i in range(classes)]
            summary["per_class"] = {"class_names": names, "correct": (held // 2).tolist(), "n": held.tolist()}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


class Page(HTMLParser):
    """Tags, texts of table cells, and a check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Two seeds of feddlp and a run of flora."""
    feddlp = [make_run(tmp_path / f"feddlp-{seed}", seed=seed, validation=True) for seed in (0, 7)]
    return [*feddlp, make_run(tmp_path / "flora", method="flora", gated=False, validation=True)]


def test_a_page_that_needs_nothing_else(three: list[Path], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first, *pictures = write_report(three, tmp_path / "out")
    assert dict(matplotlib.rcParams) == before
    assert first == tmp_path / "out" / "index.html"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {first.name, *(path.name for path in pictures)}
    text = first.read_text()
    page = Page(text)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in images] == [
        path.read_bytes() for path in pictures
    ]
    assert [path.stem for path in pictures] == [
        "accuracy", "clients", "classes-01", "classes-02", "gates-01", "exchange", "losses"
    ]  # fmt: skip
    assert not {"script", "link", "iframe", "a", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import| on\w+=", text)


def test_equal_runs_give_equal_bytes(three: list[Path], tmp_path: Path) -> None:
    one, other = (write_report(three, tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_the_table_holds_the_runs_metrics(three: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(three, tmp_path / "out")[0].read_text())
    head = page.rows[0]
    for path, row in zip(three, page.rows[1:4]):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        accuracies = [line["accuracy"] for line in lines]
        have = [client["correct"] / client["n"] for client in lines[-1]["clients"] if client["n"]]
        config = json.loads((path / "config.json").read_text())
        best = accuracies.index(max(accuracies))
        gates = f"{lines[-1]['gates_zero_share']:.1%}" if config["method"] == "feddlp" else "–"
        assert dict(zip(head, row)) == {
            "run": path.name,
            "method": config["method"],
            "encoder": "image",
            "β": "0.1",
            "seed": str(config["seed"]),
            "rounds": "3",
            "last round": f"{accuracies[-1]:.4f}",
            "best on test (round)": f"{accuracies[best]:.4f} ({best + 1})",
            "chosen on validation (round)": f"{accuracies[0]:.4f} (1)",
            "mean of clients": f"{np.mean(have):.4f}",
            "std": f"{np.std(have):.4f}",
            "lowest client": f"{min(have):.4f}",
            "parameters uploaded": "1,234",
            "MiB exchanged": "9.00",
            "gates at zero": gates,
            "time": "1 min 15 s",
        }
    runs = read_runs(three[:2])
    last = [run.accuracy[-1] for run in runs]
    assert page.rows[5][:3] == ["feddlp", "0, 7", f"{np.mean(last):.4f} ± {np.std(last):.4f}"]
    assert "zero-shot accuracy 0.2500" in page.text


def test_the_curves_hold_the_runs_metrics(three: list[Path]) -> None:
    from matplotlib.figure import Figure

    series = group_seeds(read_runs(three))
    axes = Figure().subplots()
    curves._all_runs(axes, series)
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]

    def drawn(values: Any) -> bool:
        return any(line.shape == np.shape(values) and np.allclose(line, values) for line in lines)

    seeds, (flora,) = (one.runs for one in series)
    assert all(drawn(run.accuracy) for run in (*seeds, flora))
    assert drawn(np.mean([run.accuracy for run in seeds], axis=0))
    assert all(drawn([run.best[1]]) and drawn([run.accuracy[-1]]) and drawn([run.accuracy[0]]) for run in seeds)
    assert np.array_equal(flora.exchanged, np.array([1, 2, 3]) * 3 * 2 * BYTES)
    lowest, highest = flora.over_clients("min"), flora.over_clients("max")
    assert np.array_equal(lowest, np.nanmin(flora.per_client, axis=1))
    assert np.array_equal(highest, np.nanmax(flora.per_client, axis=1))
    assert np.isnan(flora.losses["kd_local"][0])


def test_the_maps_hold_the_counts(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(maps, "png", lambda figure, tight=False: figures.append(figure) or b"")
    series = group_seeds(read_runs(three))[0]
    maps.classes_figure(series)
    maps.gates_figure(series, 1.0)
    classes, gates = (figure.axes[0] for figure in figures)
    assert [text.get_text().strip() for text in classes.texts] == ["5", "5", "2", "2", "10", "0", "4", "n"]
    held = np.array([2 / 5, 2 / 5, 1 / 2, 1 / 2])  # clients 0 and 2; client 1 has no samples and no cell
    assert np.allclose(classes.collections[0].get_array(), held)
    assert [label.get_text() for label in gates.get_yticklabels()] == PARTS
    shares = np.mean([[run.gates[part] for part in PARTS] for run in series.runs], axis=0)
    assert np.allclose(gates.collections[0].get_array(), shares.ravel())


def test_the_lowest_clients_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(maps, "png", lambda figure: figures.append(figure) or b"")
    runs = read_runs([make_run(tmp_path / "a", n=(10, 0, 4, 9))])
    maps.clients_figure(group_seeds(runs))
    axes, samples = figures[0].axes
    values = runs[0].per_client[-1]
    marked = [at for at, bar in enumerate(axes.patches) if bar.get_hatch()]
    assert marked == np.flatnonzero(values == np.nanmin(values)).tolist()
    assert [bar.get_height() for bar in axes.patches] == np.nan_to_num(values).tolist()
    assert [bar.get_height() for bar in samples.patches] == [10, 0, 4, 9]


def test_what_was_not_recorded_is_named(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", method="flora", gated=False, recorded=False)
    page = Page(write_report([old], tmp_path / "out")[0].read_text())
    assert "did not record accuracy by class" in page.text
    assert "None of these runs is of a method with gates." in page.text
    assert "chosen on validation (round)" not in page.rows[0]


def test_an_unfinished_run_is_marked_and_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    config = run / "config.json"
    config.write_text(config.read_text().replace('"rounds": 3', '"rounds": 20'))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 4, "accu')  # killed while it wrote
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    page = Page(write_report([run, make_run(tmp_path / "other")], tmp_path / "out")[0].read_text())
    assert page.rows[1][5] == "3 of 20, unfinished"
    assert page.rows[1][page.rows[0].index("parameters uploaded")] == "–"
    assert "accuracy by class is recorded when a run ends" in page.text
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_series_are_named_by_what_differs(tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"lr": 1e-3},
        {"lr": 1e-3, "seed": 3, "device": "cpu"},
        {"lr": 1e-2},
        {"lr": 1e-2, "protocol": "reference"},
        {"encoder": "text"},
        {"method": "flora", "gated": False},
    ]
    series = group_seeds(read_runs([make_run(tmp_path / str(i), **kind) for i, kind in enumerate(kinds)]))
    assert [one.label for one in series] == [
        "feddlp · image · protocol paper · lr 0.001",
        "feddlp · image · protocol paper · lr 0.01",
        "feddlp · image · protocol reference",
        "feddlp · text",
        "flora · image",
    ]
    assert [len(one.runs) for one in series] == [2, 1, 1, 1, 1]
    options = dict(differing_options(series))
    assert options["--lr"] == ["0.001", "0.01", "0.01", "0.001", "0.001"]
    assert options["--kd-direction"][2] == "teacher-student"
    assert options["--device"][0] == "auto, cpu"
    assert not {"--seed", "--method", "--encoder", "--out", "--rounds"} & set(options)


def test_names_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)</script> & $x$", dataset="folder:/data/<b>pets")
    page = Page(write_report([run], tmp_path / "out")[0].read_text())
    assert page.rows[1][0] == "script> & $x$"  # the part after the last slash
    assert "folder:/data/<b>pets" in page.text
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("clients", "classes", "rounds", "runs"),
    [(1, 1, 1, 1), (3, 4, 2, 1), (60, 5, 3, 2)]
    + [pytest.param(*shape, marks=pytest.mark.slow) for shape in ((30, 102, 40, 4), (5, 30, 3, 9))],
)
def test_pictures_of_every_shape(tmp_path: Path, clients: int, classes: int, rounds: int, runs: int) -> None:
    n = tuple(3 + client % 4 for client in range(clients))
    paths = [make_run(tmp_path / str(i), rounds=rounds, n=n, classes=classes, alpha=0.1 * (1 + i)) for i in range(runs)]
    written = write_report(paths, tmp_path / "out")
    assert len(written) == 1 + 4 + 2 * runs
    for path in written[1:]:
        width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
        assert 100 < width < 3000, path
        assert 100 < height < 6000, path


def test_nothing_exchanged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="local")
    metrics = run / "metrics.jsonl"
    metrics.write_text(re.sub(r'"bytes_(\w+)": \d+', r'"bytes_\1": 0', metrics.read_text()))
    assert Page(write_report([run], tmp_path / "out")[0].read_text()).rows[1][-3] == "0.00"
    with look():
        assert curves.exchange_figure(group_seeds(read_runs([run])))


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "pets"}, "--dataset is digits and pets"),
    ({"model": "ViT-B-32"}, "--model is glyph-clip and ViT-B-32"),
    ({"pretrained": "x"}, "--pretrained is – and x"),
    ({"test_fraction": 0.5}, "--test-fraction is 0.25 and 0.5"),
    ({"n": (10, 1, 4)}, "assigns different samples"),
    ({"partition_seed": 1}, "assigns different samples"),
    ({"partition_seed": 1, "beta": 0.2}, "--beta is 0.1 and 0.2"),
]


@pytest.mark.parametrize(("options", "message"), DIFFERENT, ids=[message for _, message in DIFFERENT])
def test_runs_that_cannot_be_compared(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1), make_run(tmp_path / "c", **options)]
    with pytest.raises(FastdlpError, match=f"^a and c cannot be compared: .*{re.escape(message)}"):
        write_report(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "message"), [("weights", "their frozen weights differ"), ("data", "data set differ")])
def test_other_weights_or_data_under_one_name(tmp_path: Path, key: str, message: str) -> None:
    paths = [make_run(tmp_path / name) for name in "ab"]
    for path in paths:
        about = json.dumps({"weights": "w", "data": "d", key: path.name})
        save_file({"x": np.zeros(1)}, path / "checkpoint.safetensors", {"fastdlp": about})
    with pytest.raises(FastdlpError, match=message):
        check_comparable(read_runs(paths))


def _line(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the second line of the metrics."""

    def apply(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        line = json.loads(lines[1])
        change(line)
        (run / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(line), *lines[2:]]) + "\n")

    return apply


def _summary(**change: Any) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | change))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not JSON": (lambda run: (run / "metrics.jsonl").write_text("{}\nx\n"), "metrics.jsonl is damaged in line 1"),
    "a key less": (_line(lambda line: line.pop("accuracy")), "damaged in line 2: lacks 'accuracy'"),
    "another round": (_line(lambda line: line.update(round=7)), "damaged in line 2: it is of round 7"),
    "NaN": (_line(lambda line: line.update(accuracy=float("nan"))), "damaged in line 2: nan is not a finite number"),
    "text": (_line(lambda line: line.update(accuracy="1")), "damaged in line 2: '1' is not a finite number"),
    "above one": (_line(lambda line: line.update(accuracy=1.5)), "damaged in line 2: 1.5 is not a fraction"),
    "a client less": (_line(lambda line: line["clients"].pop()), "damaged in line 2: its clients"),
    "too many": (_line(lambda line: line["clients"][0].update(correct=11)), "damaged in line 2: more correct"),
    "a list": (_line(lambda line: line.update(losses=[])), "damaged in line 2"),
    "cut off": (lambda run: (run / "metrics.jsonl").unlink(), "holds 0 rounds and the run has 3"),
    "no round": (
        lambda run: [(run / name).unlink() for name in ("metrics.jsonl", "summary.json")],
        "has not finished a round",
    ),
    "no partition": (lambda run: (run / "partition.json").unlink(), "cannot read the partition file"),
    "a list as partition": (lambda run: (run / "partition.json").write_text("[]"), "is not a partition file"),
    "a bad summary": (_summary(zero_shot=None), "summary.json is damaged: None is not a finite number"),
    "classes": (_summary(per_class={"class_names": ["a"], "correct": [[1]], "n": [[1]]}), "one count per client"),
    "a torn checkpoint": (lambda run: (run / "checkpoint.safetensors").write_text("x"), "checkpoint.safetensors"),
    "a config of old": (lambda run: (run / "config.json").write_text('{"x": 1}'), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_in_one_line(tmp_path: Path, damage: str) -> None:
    run = make_run(tmp_path / "run")
    change, message = DAMAGE[damage]
    change(run)
    with pytest.raises(FastdlpError, match=re.escape(message)) as raised:
        write_report([make_run(tmp_path / "good"), run], tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, cli: CLI) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    assert cli("report", run, "--out", out) == (0, f"{out / 'index.html'}: 1 run, 6 pictures\n", "")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["--out", out], "Missing argument 'RUN...'"),
        ([run], "Missing option '--out'"),
        ([tmp_path, "--out", out / "x"], "is not a run folder"),
        ([tmp_path / "none", "--out", out / "x"], "does not exist"),
        ([run, run / ".." / "run", "--out", out / "x"], "given more than once"),
        ([run, "--out", out], "is not empty: name another --out, or write into it with --overwrite"),
        ([run, "--out", tmp_path / "file"], "is not a folder"),
        ([run, "--out", tmp_path / "file" / "x"], "cannot write"),
    ]:
        code, stdout, stderr = cli("report", *arguments)
        assert (code, stdout) == (2, ""), arguments
        assert message in stderr
        assert stderr.count("\n") == 1


def test_overwrite_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = [make_run(tmp_path / str(i), alpha=0.1 * (i + 1)) for i in range(3)]
    write_report(paths, out)
    (out / "mine.png").write_bytes(b"mine")
    files = write_report(paths[:1], out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"mine.png", *(path.name for path in files)}
    assert (out / "mine.png").read_bytes() == b"mine"


def test_a_run_of_this_version(tmp_path: Path, few: Path, cli: CLI) -> None:
    for seed in (0, 1):
        code, _, err = cli(
            "train", "--partition", few, "--rounds", 2, "--seed", seed, "--out", tmp_path / str(seed), "-q"
        )
        assert (code, err) == (0, "")
    code, out, err = cli("report", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "out")
    assert (code, err) == (0, ""), out
    page = Page((tmp_path / "out" / "index.html").read_text())
    summary = json.loads((tmp_path / "0" / "summary.json").read_text())
    row = dict(zip(page.rows[0], page.rows[1]))
    best = f"{summary['accuracy_best_test']:.4f} ({summary['round_best_test']})"
    assert (row["last round"], row["best on test (round)"]) == (f"{summary['accuracy_last']:.4f}", best)
    assert (row["std"], row["lowest client"]) == (f"{summary['clients_std']:.4f}", f"{summary['clients_lowest']:.4f}")
    exchanged = summary["uploaded_bytes_total"] + summary["downloaded_bytes_total"]
    assert row["MiB exchanged"] == f"{exchanged / 2**20:,.2f}"
    assert row["gates at zero"] == f"{summary['gates_zero_share']:.1%}"
