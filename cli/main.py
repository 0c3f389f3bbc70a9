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
from fastdlp.cli.options import check_method_options, check_partition_options, config_options
from fastdlp.cli.report import report
from fastdlp.cli.reproduce import app as reproduce_app
from fastdlp.cli.sweep import sweep
from fastdlp.config import TrainConfig
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

data_app = typer.Typer(no_args_is_help=True, help="Look at data sets and how they are dealt to clients.")

PATIENCE = 10  # seconds that torchrun's other processes leave to the first one to say what is wrong

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]

TRAIN_HELP = """Train a federation: every client adapts one frozen CLIP, all of them in one batch.

Without options: FEDDLP on scikit-learn's handwritten digits with the embedded model, a demonstration that ends
in under a minute on two cores. The paper's setting, with OpenAI's weights:

  fastdlp train --dataset pets --model ViT-B-32-quickgelu --pretrained openai --download --data-dir data

A run leaves a folder with its config, the partition, a line of metrics a round, every client's adapters and a summary.
Ctrl-C stops it after the running round; --resume goes on to the same bits."""


@app.callback()
def _before_every_command(context: typer.Context) -> None:
    if context.invoked_subcommand != "train":
        refuse_several()


@app.command(help=TRAIN_HELP)
@config_options
def train(
    given: dict[str, Any],
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder.", rich_help_panel="Record"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel="Record")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show nothing but errors.", rich_help_panel="Record")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.", rich_help_panel="Record")
    ] = False,
) -> None:
    if resume is not None and overwrite:
        raise FastdlpError("--resume and --overwrite exclude each other: one keeps the run, the other replaces it")
    if resume is None:
        resolve(TrainConfig(**given))  # a wrong option is told before torch is loaded
        check_method_options(given)
        check_partition_options(given)
    elif "out" in given:
        raise FastdlpError("--resume writes to the folder of its run: leave out --out")
    from fastdlp.cli import console
    from fastdlp.run import train as training

    try:
        with console.watching(quiet or as_json) as callbacks:
            if resume is not None:
                rounds = given.pop("rounds", None)
                summary = training.resume(resume, rounds, given, callbacks)
            else:
                summary = training.train(TrainConfig(**given), overwrite, callbacks)
    except training.Stopped as stopped:
        if not leads():  # torchrun ends the first process, which may still write, when another one fails
            return
        console.print_stop(stopped)
        raise typer.Exit(130) from None
    if not leads():
        return
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        console.print_summary(summary, resume or summary["config"]["out"])


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N. Default: the run's.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data set lies now.")] = None,
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

    scores = evaluation.evaluate(run, device=device, data_dir=data_dir, adapter=adapter)
    if as_json:
        print(json.dumps(scores, indent=1))
        return
    title = f"{run}" if adapter is None else f"{adapter} on the clients of {run}"
    console.out.print(console.client_table(scores["per_client"], title))
    console.out.print(
        f"accuracy {scores['accuracy']:.4f} (zero-shot {scores['zero_shot']:.4f}), mean of clients "
        f"{scores['accuracy_mean_clients']:.4f}, lowest {scores['clients_lowest']:.4f}"
    )
    if adapter is not None:
        console.out.print(
            "an adapter that was trained on another partition may have seen these test samples", style="yellow"
        )


app.command("sweep")(sweep)
app.command()(report)
app.add_typer(reproduce_app, name="reproduce")
app.command()(export)


@app.command()
def info(
    model: Annotated[str, typer.Option("--model", help="An open_clip model or glyph-clip.")] = TrainConfig.model,
    method: Annotated[str, typer.Option("--method", help="One of train's methods.")] = TrainConfig.method,
    encoder: Annotated[str, typer.Option("--encoder", help="image, text or both.")] = TrainConfig.encoder,
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Of the data, for a classifier.")] = None,
    rank_local: Annotated[int | None, typer.Option("--rank-local", help="Default: the method's.")] = None,
    rank_global: Annotated[int, typer.Option("--rank-global")] = TrainConfig.rank_global,
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
    config = TrainConfig(
        model=model,
        method=method,
        encoder=encoder,  # type: ignore[arg-type]
        rank_local=rank_local,
        rank_global=rank_global,
    )
    facts = inspect.count(resolve(config), classes)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        console.out.print(inspect.count_table(facts))


@data_app.command()
def show(
    dataset: Annotated[str, typer.Option("--dataset", help="One of train's data sets.")] = TrainConfig.dataset,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Where the data set lies.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch it when it is not there.")] = False,
    partition: Annotated[
        str, typer.Option("--partition", help="dirichlet, iid, pathological or a file.")
    ] = TrainConfig.partition,
    clients: Annotated[int, typer.Option("--clients")] = TrainConfig.clients,
    beta: Annotated[float, typer.Option("--beta", help="Dirichlet concentration.")] = TrainConfig.beta,
    classes_per_client: Annotated[int, typer.Option("--classes-per-client")] = TrainConfig.classes_per_client,
    partition_seed: Annotated[int, typer.Option("--partition-seed")] = TrainConfig.partition_seed,
    test_fraction: Annotated[float, typer.Option("--test-fraction")] = TrainConfig.test_fraction,
    empty_clients: Annotated[
        str, typer.Option("--empty-clients", help="keep, refuse or redraw.")
    ] = TrainConfig.empty_clients,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw it to this .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Show who holds what: clients by classes, as a table and, with --picture, as a picture."""
    from fastdlp.cli import console, inspect

    config = TrainConfig(
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        partition=partition,
        clients=clients,
        beta=beta,
        classes_per_client=classes_per_client,
        partition_seed=partition_seed,
        test_fraction=test_fraction,
        empty_clients=empty_clients,  # type: ignore[arg-type]
    ).resolved()
    inspect.show_partition(config, picture, as_json, console.out)


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
        time.sleep(PATIENCE)  # the first process tells it once for all, and torchrun then ends this one
    print("fastdlp: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
