"""The command line. Bad input ends in one line and exit code 2; a defect keeps its traceback."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.cli.bench import bench_app
from fastdlp.cli.options import Json, Quiet, SummaryJson, check_options, config_options, record_option
from fastdlp.cli.reproduce import app as reproduce_app
from fastdlp.config import PARTITION_OPTIONS, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods import resolve
from fastdlp.processes import leads, refuse_several

app = typer.Typer(
    name="fastdlp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune CLIP federatedly: FEDDLP (arXiv 2503.07552) and the systems it is compared with.",
)

data_app = typer.Typer(no_args_is_help=True, help="Show data sets and their partitions.")

GRID = ("lr", "alpha", "seed")
RANK_0_SECONDS = 10.0  # that torchrun's other processes leave rank 0 to report an error

TRAIN_HELP = """Train a federation: every client adapts one frozen CLIP, all of them in one batch.

Without options: FEDDLP on scikit-learn's handwritten digits with the embedded model, a demonstration that ends
in under a minute on two cores. The paper's setting, with OpenAI's weights:

  fastdlp train --dataset pets --model ViT-B-32-quickgelu --pretrained openai --download --data-dir data

A run leaves a folder with its config, the partition, a line of metrics a round, every client's adapters and a summary.
Ctrl-C stops it after the running round; --resume continues it, bit-identically."""


@app.callback()
def _before_every_command(context: typer.Context) -> None:
    if context.invoked_subcommand != "train":
        refuse_several()


@app.command(help=TRAIN_HELP)
@config_options()
def train(
    given: dict[str, Any],
    resume: Annotated[
        Path | None, record_option("--resume", metavar="RUN", help="Go on with the run in this folder.")
    ] = None,
    overwrite: Annotated[bool, record_option("--overwrite", help="Replace the run in --out.")] = False,
    quiet: Quiet = False,
    as_json: SummaryJson = False,
) -> None:
    if resume is not None and overwrite:
        raise FastdlpError("--resume and --overwrite exclude each other: one keeps the run, the other replaces it")
    if resume is None:
        check_options(given)  # before torch is loaded
    elif "out" in given:
        raise FastdlpError("--resume writes to the folder of its run: leave out --out")
    from fastdlp.cli import console
    from fastdlp.run import train as training

    rounds = given.pop("rounds", None) if resume is not None else None
    with console.run_callbacks(quiet or as_json) as callbacks:
        if resume is not None:
            summary = training.resume(resume, rounds, given, callbacks)
        else:
            summary = training.train(TrainConfig(**given), overwrite, callbacks)
    if not leads():
        return
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        console.print_summary(summary, resume or summary["config"]["out"])


@app.command()
@config_options(("device", "data_dir"), groups=False, changed={"device": {"show_default": "the run's"}})
def evaluate(
    given: dict[str, Any],
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            help="Score every client with this adapter in place of its own: PEFT's folder, or a file of "
            "fastdlp export --format safetensors. LoRA only.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Load the saved adapters of a run and score every client on its own test samples."""
    from fastdlp.cli import console
    from fastdlp.export import evaluate as evaluation

    scores = evaluation.evaluate(run, adapter=adapter, **given)
    if as_json:
        print(json.dumps(scores, indent=1))
        return
    title = str(run) if adapter is None else f"{adapter} on the clients of {run}"
    console.out.print(console.client_table(scores["per_client"], title))
    console.print_plain(
        f"accuracy {scores['accuracy']:.4f} (zero-shot {scores['zero_shot']:.4f}), mean of clients "
        f"{scores['accuracy_mean_clients']:.4f}, lowest {scores['clients_lowest']:.4f}"
    )
    if adapter is not None:
        console.print_plain(
            "an adapter that was trained on another partition may have seen these test samples", "yellow"
        )


@app.command()
@config_options(several=GRID, changed={"out": {"help": "Folder of the sweep; needed."}})
def sweep(
    given: dict[str, Any],
    resume: Annotated[Path | None, record_option("--resume", metavar="SWEEP", help="Go on with this sweep.")] = None,
    overwrite: Annotated[bool, record_option("--overwrite", help="Replace the sweep in --out.")] = False,
    quiet: Quiet = False,
    as_json: SummaryJson = False,
) -> None:
    """Train every learning rate with every α and every seed at once, as slots of one bank.

    Each member leaves a run folder of its own in --out. With --val-fraction the best setting is picked on validation.
    """
    if resume is not None and (given or overwrite):
        raise FastdlpError("--resume takes its options from the sweep: leave out all others")
    grid = {name: given.pop(name) for name in GRID if name in given}
    if resume is None:
        check_options(given | {name: values[0] for name, values in grid.items()})  # before torch is loaded
        if "out" not in given:
            raise FastdlpError("a sweep needs a folder: pass --out")
    from fastdlp.cli import console
    from fastdlp.run import sweep as sweeping

    with console.run_callbacks(quiet or as_json) as callbacks:
        if resume is not None:
            summary = sweeping.resume_sweep(resume, callbacks)
        else:
            config = TrainConfig(**given)
            first = resolve(config)
            values = {name: tuple(grid.get(name, [getattr(first, name)])) for name in GRID}
            summary = sweeping.sweep(config, sweeping.Grid(**values), overwrite, callbacks)
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        console.print_sweep(summary, resume or given["out"])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not, or sweeps.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Folder for index.html and its PNGs; new or empty.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write to --out even if it is not empty; other files in it stay.")
    ] = False,
) -> None:
    """Compare runs: a self-contained HTML page and its pictures.

    Runs that differ only in --seed are one curve with its seeds. All must have the same data set, model and partition,
    so that their accuracies can be compared.
    """
    from fastdlp.report.write import write_report

    runs = [run for path in runs for run in _members(path)]
    page, *pictures = write_report(runs, out, overwrite)
    print(f"{page}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(pictures)} pictures")


def _members(path: Path) -> list[Path]:
    """The run itself; for a sweep, the members that have not diverged."""
    from fastdlp.run.sweep_folder import FILE, SweepFolder

    if not (path / FILE).is_file():
        return [path]
    sweep = SweepFolder(path)
    return [path / name for name in sweep.members if name not in sweep.failed]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft: an adapter that PEFT loads onto transformers' CLIPModel. open_clip: the whole model, the "
            "adapter added to its weights. safetensors: one file with a documented layout.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="Must be free. A folder for peft, a .safetensors file for safetensors, either for open_clip.",
        ),
    ],
    client: Annotated[int | None, typer.Option("--client", help="This client's personal model.")] = None,
    server: Annotated[bool, typer.Option("--global", help="The server's adapter.")] = False,
    as_json: Json = False,
) -> None:
    """Write a trained adapter for PEFT, open_clip or any program that reads safetensors.

    Gates are folded into B, and adapters that one forward adds are written as one of their summed rank.
    """
    if (client is None) != server:
        raise FastdlpError("name one of --client N and --global")
    from fastdlp.cli import console
    from fastdlp.export.api import export_adapter

    facts = export_adapter(run, out, format_, client)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    exported = ("the global adapter" if facts["rank"] else "the server's weights") if server else f"client {client}"
    rank = f", rank {facts['rank']}, lora_alpha {facts['lora_alpha']:g}" if facts["rank"] else ""
    console.print_plain(f"{out}: {exported} of {run} ({facts['method']}, {facts['encoder']} tower{rank})")
    console.print_plain(f"load it: {facts['load']}")


@app.command()
@config_options(("method", "encoder", "model", "rank_local", "rank_global"), groups=False)
def info(
    given: dict[str, Any],
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Of the data, for a classifier.")] = None,
    models: Annotated[bool, typer.Option("--models", help="List the supported models instead.")] = False,
    as_json: Json = False,
) -> None:
    """Count what a method trains and exchanges. Loads no weights."""
    from fastdlp.cli import console, inspect

    if models:
        from fastdlp.clip.load import known_models

        names = known_models()
        print(json.dumps(names) if as_json else "\n".join(names))
        return
    facts = inspect.count(resolve(TrainConfig(**given)), classes)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        console.out.print(inspect.count_table(facts))


@data_app.command()
@config_options(("dataset", "data_dir", "download", *PARTITION_OPTIONS), groups=False)
def show(
    given: dict[str, Any],
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw it to this .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Show the samples of each client by class, as a table and, with --picture, as a picture."""
    check_options(given)
    from fastdlp.cli import console, inspect

    inspect.show_partition(TrainConfig(**given).resolved(), picture, as_json, console.out)


app.add_typer(reproduce_app, name="reproduce")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line and exit."""
    try:
        code = app(standalone_mode=False)
    except FastdlpError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name != "open_clip":  # the one package that is left out on purpose, where only kernels are measured
            raise
        _fail("open_clip is not installed, and this command builds a CLIP model: pip install open_clip_torch")
    except Exception as error:
        # Wrong usage is an exception of click, which Typer vendors or imports depending on its version.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message() or 'name a command'} (see --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    if not leads():
        time.sleep(RANK_0_SECONDS)  # rank 0 reports the error, and torchrun then ends this process
    print("fastdlp: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
