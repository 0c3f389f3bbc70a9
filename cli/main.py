"""The command line. Bad input ends in one line and exit code 2; a defect keeps its traceback."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.cli.bench import bench_app
from fastdlp.cli.export import export
from fastdlp.cli.options import RECORD, Json, Quiet, SummaryJson, check_options, config_options
from fastdlp.cli.report import report
from fastdlp.cli.reproduce import app as reproduce_app
from fastdlp.cli.sweep import sweep
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
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder.", rich_help_panel=RECORD),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=RECORD)
    ] = False,
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
    with console.watching(quiet or as_json) as callbacks:
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
    console.say(
        f"accuracy {scores['accuracy']:.4f} (zero-shot {scores['zero_shot']:.4f}), mean of clients "
        f"{scores['accuracy_mean_clients']:.4f}, lowest {scores['clients_lowest']:.4f}"
    )
    if adapter is not None:
        console.say("an adapter that was trained on another partition may have seen these test samples", "yellow")


app.command("sweep")(sweep)
app.command()(report)
app.add_typer(reproduce_app, name="reproduce")
app.command()(export)


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
