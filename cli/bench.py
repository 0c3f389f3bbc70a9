"""`fastdlp bench`: what is measured, on whatever machine this is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import write_atomic

bench_app = typer.Typer(no_args_is_help=True, help="Measure, beside PEFT in the same run.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Output = Annotated[Path | None, typer.Option("--output", help="Also write the result as JSON to this file.")]


@bench_app.command("round")
def round_(
    model: Annotated[
        str, typer.Option("--model", help="An open_clip model; its weights are random here.")
    ] = "ViT-B-32-quickgelu",
    encoder: Annotated[str, typer.Option("--encoder", help="Which tower is adapted: image or text.")] = "image",
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, help="Clients of the round.", show_default="10, on a CPU 1")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Batches of each client.", show_default="4, on a CPU 1")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a batch.")] = TrainConfig.batch_size,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, bf16; may be given twice.", show_default="both"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed rounds of each form.")] = 5,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", help="torch, triton; may be given twice.", show_default="torch, on CUDA both"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="A form to measure: peft, autocast, strongest, paper, fastdlp, pre-update, full, "
            "flora; of --encoder text uncached, fastdlp. May be given again.",
            show_default="all",
        ),
    ] = None,
    template: Annotated[
        str, typer.Option("--template", help="Of the class prompts, with one {} for the name.")
    ] = "a photo of a {}.",
    without_peft: Annotated[bool, typer.Option("--without-peft", help="Leave out what needs PEFT.")] = False,
    without_launches: Annotated[
        bool, typer.Option("--without-launches", help="Count no kernels, which takes the CPU some seconds a form.")
    ] = False,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw images a second to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """A federated FEDDLP round, data to aggregation, beside what people use today; every form is checked first."""
    from fastdlp.bench.report import print_round
    from fastdlp.bench.round import Setting, bench_round
    from fastdlp.bench.round_form import KEYS
    from fastdlp.bench.round_plot import draw_round
    from fastdlp.cli import console
    from fastdlp.engine.device import DTYPES, pick_backend, pick_device

    if template.count("{}") != 1:
        raise FastdlpError(f"--template {template!r} needs exactly one {{}} for the class name")
    precisions = precision or list(DTYPES)
    _known("--precision", precisions, DTYPES)
    _known("--encoder", [encoder], KEYS)
    _known("--only", only or [], KEYS[encoder])
    on = pick_device(device)
    gpu = on.type == "cuda"
    asked = backend or (["torch", "triton"] if gpu else ["torch"])
    backends = [pick_backend(name, on, DTYPES[p]) for name in asked for p in precisions]
    setting = Setting(
        model,
        encoder,
        clients or (10 if gpu else 1),
        steps or (4 if gpu else 1),
        batch_size,
        tuple(precisions),
        repeats,
        on,
        tuple(dict.fromkeys(backends)),
        not without_peft and encoder == "image",  # no form of the text encoder needs it
        tuple(only or ()),
        template,
        not without_launches,
    )
    with console.telling("weights and images") as tell:
        result = bench_round(setting, tell, _saving(output))
    _deliver(_json(result), output, as_json, lambda: print_round(result, console.out))
    if plot is not None and result["rows"]:
        write_atomic(plot, draw_round(result))
    _exit_if(result["failed"])


@bench_app.command()
def launches(
    model: Annotated[
        str, typer.Option("--model", help="An open_clip model; its weights are random here.")
    ] = "ViT-B-32-quickgelu",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients that step together.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a client; for the bytes.")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="peft, torch or triton; may be given again.", show_default="all"),
    ] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Count the kernels that one FEDDLP step launches in every form, and the bytes they move. Needs no GPU."""
    from fastdlp.bench.launches import FORMS, bench_launches, markdown
    from fastdlp.cli import console

    _known("--only", only or [], FORMS)
    with console.err.status("counting"):
        result = bench_launches(model, clients, batch_size, only or FORMS)
    _deliver(_json(result), output, as_json, lambda: print(markdown(result["rows"]), end=""))


@bench_app.command()
def kernels(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="ViT-B-32, ViT-B-16, ViT-L-14; may be given again.", show_default="by device"),
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", min=1, help="May be given again.", show_default="by device")
    ] = None,
    linear: Annotated[
        list[str] | None,
        typer.Option("--linear", help="qkv, out, fc1, fc2, proj; may be given again.", show_default="all"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32 or bf16.", show_default="bf16, on a CPU fp32")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a client.")] = TrainConfig.batch_size,
    milliseconds: Annotated[float, typer.Option("--milliseconds", min=0.0, help="Of timing, each pass.")] = 200.0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """The dual-LoRA operator alone, beside the frozen product, PEFT and other ways to compute it.

    Without options: ViT-B-32 and ViT-L-14 for 1, 10 and 100 clients on a GPU; ViT-B-32 for one client on a CPU.
    """
    from fastdlp.bench.kernels import LINEARS, TOWERS, bench_kernels
    from fastdlp.bench.report import print_kernels
    from fastdlp.cli import console
    from fastdlp.engine.device import DTYPES, pick_device

    on = pick_device(device)
    gpu = on.type == "cuda"
    models = model or (["ViT-B-32", "ViT-L-14"] if gpu else ["ViT-B-32"])
    linears, precision = linear or list(LINEARS), dtype or ("bf16" if gpu else "fp32")
    _known("--model", models, TOWERS)
    _known("--linear", linears, LINEARS)
    _known("--dtype", [precision], DTYPES)
    with console.telling("measuring the peak") as tell:
        result = bench_kernels(
            {name: TOWERS[name] for name in models},
            clients or ([1, 10, 100] if gpu else [1]),
            linears,
            precision,
            batch_size,
            milliseconds,
            on,
            tell,
            _saving(output),
        )
    _deliver(_json(result), output, as_json, lambda: print_kernels(result, console.out))
    _exit_if(result["failed"])


@bench_app.command()
def profile(
    model: Annotated[
        str, typer.Option("--model", help="An open_clip model; its weights are random here.")
    ] = "ViT-B-32-quickgelu",
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, help="That step together.", show_default="10, on a CPU 1")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a client.")] = TrainConfig.batch_size,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32 or bf16.", show_default="fp32, on CUDA bf16")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="auto, triton or torch.")] = TrainConfig.backend,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """The kernels of one FEDDLP step by torch's profiler, for each teacher; on a GPU of the replayed step."""
    from fastdlp.bench.profile import bench_profile, print_profile
    from fastdlp.cli import console
    from fastdlp.engine.device import DTYPES, pick_backend, pick_device

    on = pick_device(device)
    gpu = on.type == "cuda"
    dtype = precision or ("bf16" if gpu else "fp32")
    _known("--precision", [dtype], DTYPES)
    chosen = pick_backend(backend, on, DTYPES[dtype])
    with console.telling("preparing") as tell:
        result = bench_profile(model, clients or (10 if gpu else 1), batch_size, dtype, chosen, on, tell)
    _deliver(_json(result), output, as_json, lambda: print_profile(result, console.out))


@bench_app.command()
def tune(
    arch: Annotated[str, typer.Option("--arch", help="auto, or this GPU's own, like 90.")] = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="fp32, bf16; may be given twice.", show_default="bf16, fp32")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, help="When to stop; the rest keeps its rows.")] = 4.0,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=0, help="That compile beforehand; 0: none.", show_default="one a core, up to 16"
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", help="Where to write the table.", show_default="kernels/tiles.json")
    ] = None,
) -> None:
    """Measure this GPU's tiles for the Triton kernels and write the table that `--backend auto` goes by.

    The table is written whenever there are new rows, so a run that is killed keeps what it found.
    """
    from fastdlp.bench.report import print_tune
    from fastdlp.bench.tune import TABLE, format_table
    from fastdlp.bench.tune import tune as measure_table
    from fastdlp.cli import console
    from fastdlp.engine.device import DTYPES, pick_device

    precisions = dtype or ["bf16", "fp32"]
    _known("--dtype", precisions, DTYPES)
    with console.telling("preparing") as tell:
        result = measure_table(
            pick_device(device),
            arch,
            precisions,
            minutes,
            tell,
            lambda tables: write_atomic(output or TABLE, format_table(tables)),
            processes,
        )
    print_tune(result, console.out)
    _exit_if(result["failed"])


@bench_app.command("compile")
def compile_kernels(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", help="80, 90; may be given twice.", show_default="both")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Take every tile, but not every rank, dtype and uneven batch.")
    ] = False,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="An earlier --output: also show what differs from it.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write the table to this file.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel in every configuration, without a GPU: registers, shared memory, tensor code, main loop.

    Exits with 1 where a kernel spills, takes too much shared memory, lacks the tensor cores' instructions or waits for
    each of them.
    """
    from fastdlp.bench.compile import SHARED_LIMIT, bench_compile, failures, print_compile, to_json, to_markdown
    from fastdlp.cli import console

    archs = arch or list(SHARED_LIMIT)
    _known("--arch", archs, SHARED_LIMIT)
    before = None if baseline is None else _read_json(baseline)
    with console.err.status("preparing") as status:
        result = bench_compile(archs, small, status.update)
    _deliver(to_json(result), output, as_json, lambda: print_compile(result, before, console.out))
    if markdown is not None:
        write_atomic(markdown, to_markdown(result, before))
    _exit_if(failures(result))


@bench_app.command()
def demonstration(
    output: Output = None,
) -> None:
    """Every method on the embedded digits, both encoders, β 0.1 and 0.01, three seeds, as a Markdown table."""
    import torch

    from fastdlp.bench.demonstration import demonstrate, markdown
    from fastdlp.bench.machine import machine
    from fastdlp.cli import console

    with console.err.status("preparing") as status:
        rows = demonstrate(status.update)
    facts = {"command": "fastdlp bench demonstration", **machine(torch.device("cpu")), "torch": torch.__version__}
    _deliver(_json({**facts, "rows": rows}), output, False, lambda: print(markdown(rows), end=""))


@bench_app.command()
def sweep(
    method: Annotated[str, typer.Option("--method", help="One of train's methods.")] = TrainConfig.method,
    lr: Annotated[
        list[float] | None, typer.Option("--lr", help="May be given again.", show_default="3e-4, 1e-3, 3e-3, 1e-2")
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option("--alpha", help="May be given again.", show_default="0.1, 1")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="May be given again.", show_default="0, 1, 42")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A sweep on digits beside its members as runs of their own: how much faster, and whether they are the same."""
    from fastdlp.bench.sweep import bench_sweep, markdown
    from fastdlp.cli import console
    from fastdlp.run.sweep import Grid

    grid = Grid(tuple(lr or (3e-4, 1e-3, 3e-3, 1e-2)), tuple(alpha or (0.1, 1.0)), tuple(seed or (0, 1, 42)))
    with console.err.status("preparing") as status:
        result = bench_sweep(TrainConfig(method=method, rounds=rounds, device=device), grid, status.update)
    _deliver(_json(result), output, as_json, lambda: print(markdown(result), end=""))


@bench_app.command()
def growth(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="An open_clip model; its weights are random here.",
            show_default="glyph-clip, on CUDA ViT-B-32-quickgelu",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Of all clients together.", show_default="1,000 batches")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=4, help="Samples a client and step.")
    ] = TrainConfig.batch_size,
    clients: Annotated[
        list[int] | None,
        typer.Option(
            "--clients", min=1, help="May be given again; 10 is always added.", show_default="1, 10, 100, 1000"
        ),
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", min=1, help="Of the global adapter; may be given again.", show_default="2, 4, 8, 16"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32 or bf16.", show_default="fp32, on CUDA bf16")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds of each point.")] = 3,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="auto, triton or torch.")] = TrainConfig.backend,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the result as PNG to this file.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """How the time of a FEDDLP round grows with clients, samples, ranks and uneven clients."""
    from fastdlp.bench.growth import CLIENTS, RANKS, bench_growth, growth_figure, print_growth
    from fastdlp.cli import console
    from fastdlp.config import EMBEDDED_MODEL
    from fastdlp.engine.device import DTYPES, pick_device

    on = pick_device(device)
    gpu = on.type == "cuda"
    dtype = precision or ("bf16" if gpu else "fp32")
    _known("--precision", [dtype], DTYPES)
    with console.err.status("preparing") as status:
        result = bench_growth(
            model or ("ViT-B-32-quickgelu" if gpu else EMBEDDED_MODEL),
            samples or 1000 * batch_size,
            batch_size,
            dtype,
            repeats,
            on,
            status.update,
            clients or CLIENTS,
            rank or RANKS,
            backend,
        )
    _deliver(_json(result), output, as_json, lambda: print_growth(result, console.out))
    if plot is not None:
        write_atomic(plot, growth_figure(result))


def _known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise FastdlpError(f"unknown {option} {name!r}: choose from {', '.join(known)}")


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FastdlpError(f"{path} is no JSON of an earlier result: {error}") from error


def _saving(output: Path | None) -> Callable[[dict[str, Any]], None]:
    """Writes the result so far, lest a killed run lose it; a write error is reported at the end."""

    def save(result: dict[str, Any]) -> None:
        if output is not None:
            with suppress(FastdlpError):
                write_atomic(output, _json(result))

    return save


def _exit_if(failed: Sequence[str]) -> None:
    """With 1, and the reasons on stderr: what was measured is written, and yet not all is well."""
    from fastdlp.cli import console

    if failed:
        console.err.print("\n".join(failed), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _deliver(text: str, output: Path | None, as_json: bool, show: Callable[[], None]) -> None:
    """Write the JSON to the file that was asked for, and print it or show what it says: also where the disk refuses."""
    try:
        if output is not None:
            write_atomic(output, text)
    finally:
        if as_json:
            print(text, end="")
        else:
            show()
