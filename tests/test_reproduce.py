"""`fastdlp reproduce` on run folders that are written here by hand: what is read, computed, shown and refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve
from fastdlp.report.paper.compare import message_sizes
from fastdlp.report.paper.plan import Plan, make_plan
from fastdlp.report.paper.tables import AVERAGE, DATASETS, PARAMETERS, PUBLISHED, TABLES, Cell, paper_mb, published
from fastdlp.report.read import read_finished

CLI = Callable[..., tuple[int, str, str]]
Accuracies = Callable[[Cell, int], Sequence[float]]
METRICS = [f"{metric}{which}" for metric in ("", "std_", "lowest_") for which in ("last", "best")]
HEADER = 3_000  # bytes of a message that are not parameters
SAMPLES = 10**9  # of each client, so that every accuracy can be had
OTHER = {"losses": {}, "gates_zero_share": None, "gates_zero_by_part": {}, "seconds": 1.0}  # of a line of metrics


def _write_run(config: TrainConfig, accuracies: Sequence[float]) -> None:
    """A finished run's folder, as `fastdlp train` leaves it, with these accuracies.

    The clients' standard deviation is a tenth of the accuracy, and the lowest client has half of it.
    """
    config = resolve(config)
    folder = Path(str(config.out))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "partition.json").write_text(json.dumps({"clients": {"0": {}, "1": {}}}))
    shared = config.method not in ("local", "local-sora")
    message = 4 * PARAMETERS[config.encoder] + HEADER if shared else 0
    with open(folder / "metrics.jsonl", "w") as file:
        for number, accuracy in enumerate(accuracies, start=1):
            low, high = ({"correct": round(part * accuracy * SAMPLES), "n": SAMPLES} for part in (0.5, 0.7))
            clients = [
                {"client": 0, "bytes_sent": message, "bytes_received": message, **low},
                {"client": 1, "bytes_sent": 0, "bytes_received": message, **high},  # no training samples
            ]
            file.write(json.dumps({"round": number, "accuracy": accuracy, **OTHER, "clients": clients}) + "\n")
    uploaded = PARAMETERS[config.encoder] if shared else 0
    summary = {"rounds": config.rounds, "seconds_total": 1, "zero_shot": 0.1, "uploaded_parameters": uploaded}
    (folder / "summary.json").write_text(json.dumps(summary))


def _write_all(plan: Plan, accuracies: Accuracies) -> None:
    for cell in plan.cells():
        for seed in plan.seeds:
            _write_run(plan.config(cell, seed), accuracies(cell, seed))


def _accuracies(cell: Cell, seed: int) -> list[float]:
    """Three rounds, the second the best; another level for every run of a table."""
    level = 0.5 + 0.05 * DATASETS.index(cell.dataset) + 0.01 * len(cell.method) + 0.0007 * seed
    return [level, level + 0.04, level + 0.02]


def _rows(folder: Path, table: str) -> list[dict[str, str]]:
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def reproduced(tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    """Compare runs that are there and return the rows of the CSV file."""
    monkeypatch.chdir(tmp_path)

    def call(table: str, *options: str) -> list[dict[str, str]]:
        code, _, err = cli("reproduce", table, "--rounds", 3, "--no-run", *options)
        assert (code, err) == (0, "")
        folder = tmp_path / "reproduce" / table
        assert {path.name for path in folder.iterdir()} == {f"{table}.{suffix}" for suffix in ("md", "csv", "png")}
        with Image.open(folder / f"{table}.png") as image:
            assert len(image.convert("RGB").getcolors(2**24) or []) > 20
        return _rows(folder, table)

    return call


def test_every_published_result_is_in_one_table() -> None:
    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    results = json.loads(PUBLISHED.read_text())
    cells = {
        (name, Cell(encoder, beta, method, dataset))
        for name, table in TABLES.items()
        if table.kind != "curve"
        for encoder in table.encoders
        for beta in table.betas
        for method in table.methods
        for dataset in ((*DATASETS, AVERAGE) if table.kind == "accuracy" else DATASETS)
    }
    held = {kind: [published(TABLES[n], c) for n, c in cells if TABLES[n].kind == kind] for kind in results}
    for kind in ("accuracy", "clients", "ablation"):
        assert sum(map(len, held[kind])) == leaves(results[kind])
    targets = 2 * len(DATASETS) * 2
    assert len(held["communication"]) == leaves(results["communication"]) - targets == 40


def test_the_published_megabytes_are_whole_rounds() -> None:
    wrong = []
    for name in ("table5", "table6"):
        table = TABLES[name]
        (encoder,) = table.encoders
        for cell in (Cell(encoder, b, m, d) for b in table.betas for m in table.methods for d in DATASETS):
            results = published(table, cell)
            if abs(paper_mb(int(results["rounds"]), PARAMETERS[encoder]) - results["mb"]) > 0.00501:
                wrong.append((cell, results["mb"], results["rounds"]))
    assert wrong == [(Cell("text", 0.01, "feddat", "pets"), 20.48, 12)]  # 12 rounds are 20.45
    assert f"{paper_mb(12, PARAMETERS['text']):.2f}" == "20.45"
    assert f"{paper_mb(6, PARAMETERS['image']):.2f}" == "15.30"


@pytest.mark.parametrize("encoder", ["image", "text"])
@pytest.mark.parametrize("method", ["flora", "feddlp"])
def test_the_parameters_are_those_that_are_sent(method: str, encoder: str, cli: CLI) -> None:
    code, out, _ = cli("info", "--model", "ViT-B-32-quickgelu", "--method", method, "--encoder", encoder, "--json")
    assert (code, json.loads(out)["uploaded_parameters"]) == (0, PARAMETERS[encoder])


def test_the_published_average_is_of_means_and_deviations() -> None:
    for table in (TABLES["table1"], TABLES["table2"]):
        for encoder in table.encoders:
            for method in table.methods:
                mine = [published(table, Cell(encoder, table.betas[0], method, d)) for d in (*DATASETS, AVERAGE)]
                for name in ("mean", "std"):
                    assert mine[-1][name] == pytest.approx(fmean(f[name] for f in mine[:-1]), abs=0.0151)


def test_the_papers_setting_is_the_default(tmp_path: Path) -> None:
    plan = make_plan("table1", tmp_path)
    configs = [resolve(config) for config in plan.configs()]
    assert len(configs) == 4 * 5 * 2 * 3
    assert len({config.out for config in configs}) == len(configs)
    assert {(c.model, c.pretrained, c.rounds, c.beta, c.clients, c.report, c.partition_seed) for c in configs} == {
        ("ViT-B-32-quickgelu", "openai", 100, 0.1, 10, "last", 0)
    }
    assert {config.seed for config in configs} == {0, 1, 42}
    smoke = make_plan("table5", tmp_path, dataset=["digits"])
    assert {(c.model, c.pretrained, c.rounds, c.lr) for c in (resolve(c) for c in smoke.configs())} == {
        ("glyph-clip", None, 20, 1e-3)
    }
    assert smoke.target == 0.95


def test_tables_share_runs(tmp_path: Path) -> None:
    def runs(name: str) -> set[TrainConfig]:
        return set(make_plan(name, tmp_path).configs())

    assert runs("table1") == runs("table3")
    assert runs("table5") | runs("table6") < runs("table1") | runs("table2")
    assert len(runs("table7") & runs("table1")) == len(runs("table7")) / 2  # feddlp's
    assert len(runs("figure2") & runs("table1")) == len(runs("figure2")) / 2  # local's


def test_options_reach_the_runs(tmp_path: Path) -> None:
    plan = make_plan("table1", tmp_path, lr=["flora=1e-4"], partition_seeds="seed", precision="bf16", seed=[7, 7])
    assert {(c.method, c.lr) for c in plan.configs()} == {
        ("flora", 1e-4),
        *((method, None) for method in ("local", "fedclip", "feddat", "feddlp")),
    }
    assert {(c.seed, c.partition_seed, c.precision) for c in plan.configs()} == {(7, 7, "bf16")}


def test_accuracy(tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    plan = make_plan("table1", tmp_path / "runs/reproduce", rounds=3)
    _write_all(plan, _accuracies)
    rows = reproduced("table1")
    assert len(rows) == 2 * 5 * 5
    row = next(r for r in rows if (r["encoder"], r["dataset"], r["method"]) == ("image", "dtd", "feddlp"))
    last = [100 * _accuracies(Cell("image", 0.1, "feddlp", "dtd"), seed)[-1] for seed in (0, 1, 42)]
    results = {name: float(row[name]) for name in list(row)[4:]}
    assert results == pytest.approx(
        {
            "seeds": 3,
            "last": fmean(last),
            "last_std": pstdev(last),
            "best": fmean(last) + 2,
            "best_std": pstdev(last),
            "paper": 81.23,
            "paper_std": 0.29,
            "difference": fmean(last) - 81.23,
        }
    )
    average = next(r for r in rows if (r["encoder"], r["dataset"], r["method"]) == ("image", "average", "feddlp"))
    four = [r for r in rows if (r["encoder"], r["method"]) == ("image", "feddlp") and r["dataset"] != "average"]
    for name in ("last", "last_std", "best", "best_std"):
        assert float(average[name]) == pytest.approx(fmean(float(r[name]) for r in four))
    assert float(average["difference"]) == pytest.approx(float(average["last"]) - 82.40)
    page = (tmp_path / "reproduce/table1/table1.md").read_text()
    assert f"| dtd | feddlp | {fmean(last):.2f} ± {pstdev(last):.2f} |" in page
    assert "| last round * | best round | paper | difference |" in page
    assert "partition seed 0 for all" in page
    assert "3 rounds" in page
    assert "The paper's setting differs: ViT-B-32-quickgelu (openai), 100 rounds." in page

    few = reproduced("table1", "--dataset", "pets", "--dataset", "dtd", "--method", "flora", "--seed", "1")
    assert [(r["encoder"], r["dataset"], r["method"], r["seeds"]) for r in few] == [
        (encoder, dataset, "flora", "1") for encoder in ("text", "image") for dataset in ("pets", "dtd")
    ]


def test_the_best_round_counts_where_the_report_is_best(
    tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]
) -> None:
    plan = make_plan("table4", tmp_path / "runs/reproduce", rounds=3, protocol="reference", dataset=["pets"])
    _write_all(plan, _accuracies)
    for row in reproduced("table4", "--protocol", "reference", "--dataset", "pets"):
        cell = Cell(row["encoder"], 0.01, row["method"], "pets")
        paper = published(TABLES["table4"], cell)
        best = fmean(100 * max(_accuracies(cell, seed)) for seed in (0, 1, 42))
        assert float(row["std_best"]) == pytest.approx(best / 10)
        assert float(row["std_last"]) == pytest.approx((best - 2) / 10)
        assert float(row["lowest_best"]) == pytest.approx(best / 2)
        assert float(row["std_difference"]) == pytest.approx(best / 10 - paper["std"])
        assert float(row["lowest_difference"]) == pytest.approx(best / 2 - paper["lowest"])
    assert "std, best round *" in (tmp_path / "reproduce/table4/table4.md").read_text()


def test_communication(tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    """FEDDLP reaches the target of Pets in round 2 or 3 by seed, FLoRA with one seed, FedDAT never."""

    def accuracies(cell: Cell, seed: int) -> list[float]:
        when = {"feddlp": 2 if seed else 3, "flora": 2 if seed == 1 else 4, "feddat": 4}[cell.method]
        return [0.5 if number < when else 0.88 for number in (1, 2, 3)]

    options = ("--dataset", "pets", "--beta", "0.1")
    plan = make_plan("table6", tmp_path / "runs/reproduce", rounds=3, dataset=["pets"], beta=[0.1])
    _write_all(plan, accuracies)
    flora, feddat, feddlp = reproduced("table6", *options)
    assert [row["method"] for row in (flora, feddat, feddlp)] == ["flora", "feddat", "feddlp"]
    assert (feddlp["rounds"], feddlp["seeds_reaching"], feddlp["paper_rounds"]) == ("3 2 2", "3", "4")
    assert float(feddlp["mb"]) == pytest.approx(2 * 1.275 * 7 / 3)
    message = 4 * PARAMETERS["image"] + HEADER
    assert int(feddlp["bytes"]) == round(2 * message * 7 / 3)
    assert float(feddlp["difference"]) == pytest.approx(2 * 1.275 * 7 / 3 - 10.20)
    assert (flora["rounds"], flora["seeds_reaching"]) == ("never 2 never", "1")
    assert (feddat["rounds"], feddat["mb"], feddat["bytes"], feddat["difference"]) == ("never never never", "", "", "")
    page = (tmp_path / "reproduce/table6/table6.md").read_text()
    assert "| pets | flora | 88 | never 2 never | 5.10 |" in page
    assert "| pets | feddat | 88 | never never never | not reached | not reached | 88 | 6 | 15.30 | – |" in page

    lower = reproduced("table6", *options, "--target", "0.5")
    assert {(row["target"], row["paper_target"], row["rounds"], row["difference"]) for row in lower} == {
        ("50", "88", "1 1 1", "")  # another target than the paper's: no difference
    }


def test_a_smoke_run_has_no_differences(tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    for table in ("table2", "table3", "table5", "table8"):
        plan = make_plan(table, tmp_path / "runs" / table, rounds=3, dataset=["digits"], seed=[0])
        _write_all(plan, lambda cell, seed: [0.9, 0.96, 0.94])
        rows = reproduced(table, "--dataset", "digits", "--seed", "0", "--runs", f"runs/{table}")
        assert {row["dataset"] for row in rows if row["seeds"] == "1"} == {"digits"}
        assert {row["dataset"] for row in rows if row["seeds"] == "0"} >= set(DATASETS)
        assert {value for row in rows for name, value in row.items() if "difference" in name} == {""}
        for row in rows:
            ours = [value for name, value in row.items() if name in ("mb", *METRICS)]
            paper = [value for name, value in row.items() if "paper" in name and name != "paper_std"]
            assert all(ours) == (row["dataset"] == "digits") == (not any(paper)), row
        page = (tmp_path / f"reproduce/{table}/{table}.md").read_text()
        assert "smoke run on digits: the paper's results are for other data" in page
    assert {row["target"] for row in _rows(tmp_path / "reproduce/table5", "table5")} == {"95", ""}


def test_figure2(tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    plan = make_plan("figure2", tmp_path / "runs/reproduce", rounds=3, beta=[0.5])
    _write_all(plan, _accuracies)
    rows = reproduced("figure2", "--beta", "0.5")
    assert len(rows) == 2 * 4 * 2 * 3
    first = [100 * _accuracies(Cell("text", 0.5, "local", "pets"), seed)[0] for seed in (0, 1, 42)]
    assert {k: rows[0][k] for k in ("encoder", "beta", "dataset", "method", "seeds", "round")} == {
        "encoder": "text",
        "beta": "0.5",
        "dataset": "pets",
        "method": "local",
        "seeds": "3",
        "round": "1",
    }
    assert float(rows[0]["accuracy"]) == pytest.approx(fmean(first))
    assert float(rows[0]["accuracy_std"]) == pytest.approx(pstdev(first))
    assert "paper" not in (tmp_path / "reproduce/figure2/figure2.csv").read_text()


def test_bars_are_the_rows() -> None:
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

    from fastdlp.report.paper.plot import _bars

    axes = Figure().subplots()
    rows = [
        {"seeds": 2, "last": 80.0, "last_std": 1.0, "paper": 90.0, "paper_std": None},
        {"seeds": 2, "last": None, "last_std": None, "paper": 60.0, "paper_std": None},  # ran, and did not reach
        {"seeds": 0, "last": None, "last_std": None, "paper": 70.0, "paper_std": 2.0},
    ]
    _bars(axes, np.arange(3), rows, ("last", "last_std"), ("paper", "paper_std"), "red", 0.2)
    ours, paper = (c for c in axes.containers if isinstance(c, BarContainer))
    assert [bar.get_height() for bar in ours] == [80.0]
    assert [bar.get_height() for bar in paper] == [90.0, 60.0, 70.0]
    assert [bar.get_x() + bar.get_width() / 2 for bar in (*ours, *paper)] == pytest.approx([-0.1, 0.1, 1.1, 2.0])
    assert [bar.get_width() for bar in (*ours, *paper)] == pytest.approx([0.2, 0.2, 0.2, 0.4])


def test_missing_runs(tmp_path: Path, cli: CLI, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    plan = make_plan("table7", tmp_path / "runs/reproduce", rounds=3, encoder=["text"])
    _write_all(plan, _accuracies)
    runs = Path("runs/reproduce")
    for name in ("pets-feddlp-text-beta0.1-seed0", "dtd-feddlp-text-beta0.1-seed0"):  # not ended
        (runs / name / "summary.json").unlink()
    for seed in plan.seeds:
        for path in (runs / f"aircraft-combined-text-beta0.1-seed{seed}").iterdir():
            path.unlink()
    arguments = ("reproduce", "table7", "--encoder", "text", "--rounds", 3, "--no-run")
    code, out, err = cli(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "5 missing runs of 24" in err
    assert "--partial" in err
    rows = {(r["dataset"], r["method"]): r for r in reproduced("table7", "--encoder", "text", "--partial")}
    assert rows["pets", "feddlp"]["seeds"] == "2"
    assert rows["aircraft", "combined"]["last"] == rows["aircraft", "combined"]["difference"] == ""
    page = Path("reproduce/table7/table7.md").read_text()
    assert "| aircraft | combined | – | – | 53.21 | – | – |" in page
    assert "| 2 of 3 |" in page
    assert "5 of 24 runs are missing" in page
    assert page.count("aircraft-combined-text-beta0.1-seed") == 3


def test_reading_changes_nothing(tmp_path: Path) -> None:
    (config,) = make_plan("table7", tmp_path, encoder=["text"], rounds=2, seed=[0], method=["feddlp"],
                          dataset=["pets"]).configs()  # fmt: skip
    _write_run(config, [0.1, 0.2])
    before = {path: path.read_bytes() for path in Path(str(config.out)).iterdir()}
    run = read_finished(Path(str(config.out)))
    assert before == {path: path.read_bytes() for path in Path(str(config.out)).iterdir()}
    assert (run.rounds_to(0.2), run.rounds_to(0.21)) == (2, None)
    assert message_sizes(run, 2) == (4 * 0.852, 4 * (4 * PARAMETERS["text"] + HEADER))


def test_ledger_of_a_run(tmp_path: Path, cli: CLI) -> None:
    config = TrainConfig(method="feddlp", rounds=7, out=str(tmp_path / "run"))
    _write_run(config, [0.1] * 5 + [0.9] * 2)
    _, out, _ = cli("reproduce", "ledger", tmp_path / "run", "--target", 0.9)
    assert "6 rounds to an accuracy of 0.9" in out
    assert "15.30 MB" in out
    assert f"{12 * (4 * PARAMETERS['image'] + HEADER):,} bytes" in out
    assert "17.85 MB" in cli("reproduce", "ledger", tmp_path / "run")[1]
    _, out, _ = cli("reproduce", "ledger", tmp_path / "run", "--target", 0.95)
    assert "does not reach 0.95: its best round is 6" in out


LINE = json.dumps({"round": 1, **OTHER})[:-1] + ', "accuracy": %s, "clients": [%s]}\n'
CLIENT = '{"client": 0, "correct": 1, "n": 2, "bytes_sent": 0, "bytes_received": %s}'
DAMAGE = {
    "metrics.jsonl": [
        ("", "holds 0 rounds"),
        ('{"round": 1, "accuracy": 0.5', "damaged in line 1"),
        ("[]\n", "damaged in line 1"),
        ('{"round": 2}\n', "damaged in line 1"),
        (LINE % ("NaN", CLIENT % "0"), "damaged in line 1: nan is not a finite number"),
        (LINE % ("0.5", ""), "damaged in line 1"),
        (LINE % ("0.5", "3"), "damaged in line 1"),
        (LINE % ("0.5", CLIENT % '"many"'), "damaged in line 1: 'many' is not a count"),
    ],
    "summary.json": [
        ("{}", "not a summary"),
        ("nonsense", "not JSON"),
        ('{"rounds": 1, "seconds_total": 1, "zero_shot": 0}', "uploaded_parameters"),
    ],
    "config.json": [("{}}", "config.json"), ('{"no_option": 1}', "no_option"), ('{"method": 3}', "--method")],
}


@pytest.mark.parametrize(("file", "content", "word"), [(f, *case) for f, cases in DAMAGE.items() for case in cases])
def test_damaged_runs_are_refused(file: str, content: str, word: str, tmp_path: Path, cli: CLI) -> None:
    arguments = ("--encoder", "text", "--rounds", 1, "--seed", 0, "--method", "feddlp", "--dataset", "pets")
    (config,) = make_plan("table7", tmp_path / "runs", encoder=["text"], rounds=1, seed=[0], method=["feddlp"],
                          dataset=["pets"]).configs()  # fmt: skip
    _write_run(config, [0.5])
    (Path(str(config.out)) / file).write_text(content)
    code, out, err = cli("reproduce", "table7", *arguments, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err
    assert str(config.out) in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"lr": 1e-3}, "--lr 0.001 (now 1e-05)"),
        ({"rounds": 2}, "--rounds 2 (now 1)"),
        ({"partition_seed": 3}, "--partition-seed 3 (now 0)"),
        ({"model": "ViT-B-16"}, "--model ViT-B-16 (now ViT-B-32-quickgelu)"),
        ({"alpha": 1.0}, "--alpha 1.0 (now 0.1)"),
        ({"rank_local": 8}, "--rank-local 8 (now None)"),
    ],
)
def test_a_run_of_other_options_is_refused(option: dict[str, Any], word: str, tmp_path: Path, cli: CLI) -> None:
    plan = make_plan("table7", tmp_path / "runs", encoder=["text"], rounds=1, seed=[0], method=["feddlp"],
                     dataset=["pets"])  # fmt: skip
    (config,) = plan.configs()
    _write_run(replace(config, **option), [0.5] * (option.get("rounds") or 1))
    arguments = ("--encoder", "text", "--rounds", 1, "--seed", 0, "--method", "feddlp", "--dataset", "pets")
    code, out, err = cli("reproduce", "table7", *arguments, "--runs", tmp_path / "runs")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err
    assert "name another --runs" in err


def test_another_machine_is_no_other_run(tmp_path: Path, reproduced: Callable[..., list[dict[str, str]]]) -> None:
    plan = make_plan("table7", tmp_path / "runs/reproduce", encoder=["text"], rounds=3, seed=[0])
    for config in plan.configs():
        elsewhere = {"device": "cuda:1", "backend": "triton", "micro_batch": 64, "trace": True, "data_dir": "/data"}
        _write_run(replace(config, **elsewhere), [0.5] * 3)
    assert len(reproduced("table7", "--encoder", "text", "--seed", "0")) == 8


BAD = {
    "table9": ["'table9'", "table1, table2", "figure2"],
    "table1 --dataset cifar": ["table1 has no --dataset cifar", "pets, flowers, aircraft, dtd, digits"],
    "table1 --dataset digits --dataset pets": ["digits", "alone"],
    "table1 --method combined": ["table1 has no --method combined", "local, fedclip, flora, feddat, feddlp"],
    "table5 --method flora": ["table5 has no --method flora", "feddat, feddlp"],
    "table5 --encoder image": ["table5 has no --encoder image", "text"],
    "table1 --beta 0.01": ["table1 has no --beta 0.01", "0.1"],
    "figure2 --beta 0": ["--beta is 0.0"],
    "table1 --rounds 0": ["--rounds is 0"],
    "table1 --seed -1": ["--seed is -1"],
    "table1 --protocol nope": ["--protocol", "paper, reference"],
    "table1 --partition-seeds nope": ["--partition-seeds", "fixed, seed"],
    "table1 --target 0.9": ["--target", "table5"],
    "table5 --target 88": ["--target is 88", "fraction"],
    "table5 --target nan": ["--target is nan"],
    "table1 --lr feddlp": ["--lr 'feddlp'", "METHOD=VALUE"],
    "table1 --lr feddlp=much": ["'much'", "METHOD=VALUE"],
    "table1 --lr feddlp=0": ["--lr is 0.0"],
    "table1 --lr nope=1": ["--lr 'nope=1'", "local, fedclip"],
    "table1 --lr feddlp=1 --lr feddlp=2": ["--lr", "feddlp", "two values"],
    "table1 --jobs 0": ["--jobs is 0", "at least 1"],
    "table1 --partial": ["--no-run"],
    "table1 --device cuda:0,gpu": ["'gpu'", "cuda:N"],
    "table1 --runs file": ["--runs file", "not a folder"],
    "table1 --runs run": ["--runs run", "a run itself"],
    "table1 --out file --no-run --partial": ["--out file", "not a folder"],
    "table1 --runs other --seed 0": ["other/pets-local-text-beta0.1-seed0", "not a run folder", "--runs"],
    "table1 folder": ["unexpected extra argument", "folder"],
    "ledger": ["Missing argument", "RUN"],
    "ledger other": ["other", "is not a run folder"],
    "ledger run": ["run has not ended"],
    "ledger run --target 88": ["--target is 88"],
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command: str, tmp_path: Path, cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("run").mkdir()
    Path("run/config.json").write_text(TrainConfig().resolved().to_json())
    place = Path("other/pets-local-text-beta0.1-seed0")
    place.mkdir(parents=True)
    (place / "notes.txt").touch()
    before = set(tmp_path.rglob("*"))
    code, out, err = cli("reproduce", *command.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in BAD[command] if word not in err] == [], err
    assert set(tmp_path.rglob("*")) == before


def test_a_plan_is_checked_in_python_too(tmp_path: Path) -> None:
    with pytest.raises(FastdlpError, match="unknown table"):
        make_plan("tableX", tmp_path)
