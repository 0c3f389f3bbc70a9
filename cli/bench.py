"""`fastdlp bench`: measurements on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdlp.config import EMBEDDED_MODEL, TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.files import write_atomic

if TYPE_CHECKING:
    import torch
    from rich.console import Console

bench_app = typer.Typer(no_args_is_help=True, help="Measure, beside PEFT in the same run.")
VIT = "ViT-B-32-quickgelu"


def _option(flag: str, text: str, default: str | bool = True, **limits: Any) -> Any:
    return typer.Option(flag, help=text, show_default=default, **limits)


def _many(flag: str, text: str, default: str, **limits: Any) -> Any:
    return _option(flag, f"{text} May be given again.", default, **limits)


Json = Annotated[bool, _option("--json", "Print JSON on stdout and nothing else there.")]
Output = Annotated[Path | None, _option("--output", "Also write the result as JSON to this file.")]
Model = Annotated[str, _option("--model", "An open_clip model; its weights are random here.")]
Clients = Annotated[int | None, _option("--clients", "Clients that step together.", "10, on a CPU 1", min=1)]
BatchSize = Annotated[int, _option("--batch-size", "Images a client and step.", min=1)]
Precision = Annotated[str | None, _option("--precision", "fp32 or bf16.", "fp32, on CUDA bf16")]
Device = Annotated[str, _option("--device", "auto, cpu, cuda or cuda:N.")]
Backend = Annotated[str, _option("--backend", "auto, triton or torch.")]


@bench_app.command("round")
def round_(
    model: Model = VIT,
    encoder: Annotated[str, _option("--encoder", "Which tower is adapted: image or text.")] = "image",
    clients: Clients = None,
    steps: Annotated[int | None, _option("--steps", "Batches of each client.", "4, on a CPU 1", min=1)] = None,
    batch_size: BatchSize = TrainConfig.batch_size,
    precision: Annotated[list[str] | None, _many("--precision", "fp32, bf16.", "both")] = None,
    repeats: Annotated[int, _option("--repeats", "Timed rounds of each variant.", min=2)] = 5,
    device: Device = "auto",
    backend: Annotated[list[str] | None, _many("--backend", "torch, triton.", "torch, on CUDA both")] = None,
    only: Annotated[
        list[str] | None,
        _many(
            "--only",
            "A variant to measure: peft, autocast, strongest, paper, fastdlp, pre-update, full, flora; with --encoder "
            "text uncached, fastdlp.",
            "all",
        ),
    ] = None,
    template: Annotated[str, _option("--template", "Class prompts, with one {} for the name.")] = "a photo of a {}.",
    without_peft: Annotated[bool, _option("--without-peft", "Leave out what needs PEFT.")] = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A federated FEDDLP round, data to aggregation, beside what people use today; every variant is checked first."""
    from fastdlp.bench.round import KEYS, Setting, bench_round, print_round
    from fastdlp.engine.device import DTYPES, pick_backend

    TrainConfig(template=template).check()
    precisions = precision or list(DTYPES)
    _known("--precision", precisions, DTYPES)
    _known("--encoder", [encoder], KEYS)
    _known("--only", only or [], KEYS[encoder])
    on, gpu = _on(device)
    backends = backend or (["torch", "triton"] if gpu else ["torch"])
    setting = Setting(
        model=model,
        encoder=encoder,
        clients=clients or (10 if gpu else 1),
        steps=steps or (4 if gpu else 1),
        batch=batch_size,
        precisions=tuple(precisions),
        repeats=repeats,
        device=on,
        backends=tuple(dict.fromkeys(pick_backend(name, on, DTYPES[p]) for name in backends for p in precisions)),
        with_peft=not without_peft and encoder == "image",  # no variant of the text encoder needs it
        only=tuple(only or ()),
        template=template,
    )
    _measure(partial(bench_round, save=_saving(output)), print_round, output, as_json, setting)


@bench_app.command()
def growth(
    model: Annotated[
        str | None,
        _option("--model", "An open_clip model; its weights are random here.", f"{EMBEDDED_MODEL}, on CUDA {VIT}"),
    ] = None,
    samples: Annotated[int | None, _option("--samples", "Of all clients together.", "1,000 batches", min=1)] = None,
    batch_size: Annotated[int, _option("--batch-size", "Samples a client and step.", min=4)] = TrainConfig.batch_size,
    clients: Annotated[
        list[int] | None, _many("--clients", "Numbers of clients; 10 is always added.", "1, 10, 100, 1000", min=1)
    ] = None,
    precision: Precision = None,
    repeats: Annotated[int, _option("--repeats", "Timed rounds of each point.", min=1)] = 3,
    device: Device = "auto",
    backend: Backend = TrainConfig.backend,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """How the time of a FEDDLP round grows with clients and uneven clients."""
    from fastdlp.bench.growth import CLIENTS, bench_growth, print_growth

    on, gpu = _on(device)
    precision = _dtype("--precision", precision, gpu)
    model, samples = model or (VIT if gpu else EMBEDDED_MODEL), samples or 1000 * batch_size
    options = model, samples, batch_size, precision, repeats, on, clients or CLIENTS, backend
    _measure(bench_growth, print_growth, output, as_json, *options)


@bench_app.command()
def kernels(
    model: Annotated[list[str] | None, _many("--model", "ViT-B-32, ViT-B-16, ViT-L-14.", "by device")] = None,
    clients: Annotated[list[int] | None, _many("--clients", "Numbers of clients.", "by device", min=1)] = None,
    linear: Annotated[list[str] | None, _many("--linear", "qkv, out, fc1, fc2, proj.", "all")] = None,
    dtype: Annotated[str | None, _option("--dtype", "fp32 or bf16.", "bf16, on a CPU fp32")] = None,
    batch_size: BatchSize = TrainConfig.batch_size,
    milliseconds: Annotated[float, _option("--milliseconds", "Of timing, each variant.", min=0.0)] = 200.0,
    device: Device = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """The dual-LoRA operator alone, in both backends, beside the frozen product.

    Without options: ViT-B-32 and ViT-L-14 for 1 and 10 clients on a GPU; ViT-B-32 for one client on a CPU.
    """
    from fastdlp.bench.kernels import LINEARS, TOWERS, bench_kernels, print_kernels

    on, gpu = _on(device)
    dtype = _dtype("--dtype", dtype, gpu)
    models, numbers = model or ["ViT-B-32", "ViT-L-14"][: 1 + gpu], clients or [1, 10][: 1 + gpu]
    _known("--model", models, TOWERS)
    _known("--linear", linear or [], LINEARS)
    towers = {name: TOWERS[name] for name in models}
    options = towers, numbers, linear or LINEARS, dtype, batch_size, milliseconds, on
    _measure(partial(bench_kernels, save=_saving(output)), print_kernels, output, as_json, *options)


@bench_app.command()
def profile(
    model: Model = VIT,
    clients: Clients = None,
    batch_size: BatchSize = TrainConfig.batch_size,
    precision: Precision = None,
    device: Device = "auto",
    backend: Backend = TrainConfig.backend,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """The kernels of one FEDDLP step by torch's profiler, for each teacher; on a GPU of the replayed step."""
    from fastdlp.bench.profile import bench_profile, print_profile
    from fastdlp.engine.device import DTYPES, pick_backend

    on, gpu = _on(device)
    precision = _dtype("--precision", precision, gpu)
    backend, clients = pick_backend(backend, on, DTYPES[precision]), clients or (10 if gpu else 1)
    _measure(bench_profile, print_profile, output, as_json, model, clients, batch_size, precision, backend, on)


@bench_app.command()
def launches(
    model: Model = VIT,
    without_peft: Annotated[bool, _option("--without-peft", "Leave out what needs PEFT.")] = False,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Count the kernels that one FEDDLP step launches in every variant. Needs no GPU."""
    from fastdlp.bench.launches import bench_launches, print_launches

    _measure(bench_launches, print_launches, output, as_json, model, not without_peft)


@bench_app.command("compile")
def compile_kernels(
    arch: Annotated[list[str] | None, _many("--arch", "80, 90.", "both")] = None,
    small: Annotated[bool, _option("--small", "Every tile, but not every rank, dtype and uneven batch.")] = False,
    markdown: Annotated[Path | None, _option("--markdown", "Also write the table to this file.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel in every configuration, without a GPU: registers, shared memory, tensor code, main loop.

    Exits with 1 where a kernel spills, takes too much shared memory, lacks the tensor cores' instructions or waits for
    each of them.
    """
    from fastdlp.bench.compile import SHARED_LIMIT, bench_compile, print_compile, to_markdown

    archs = arch or list(SHARED_LIMIT)
    _known("--arch", archs, SHARED_LIMIT)

    def compiled(progress: Callable[[str], None]) -> dict[str, Any]:
        result = bench_compile(archs, small, progress)
        if markdown is not None:
            write_atomic(markdown, to_markdown(result))
        return result

    _measure(compiled, print_compile, output, as_json)


@bench_app.command()
def tune(
    dtype: Annotated[list[str] | None, _many("--dtype", "fp32, bf16.", "bf16, fp32")] = None,
    minutes: Annotated[float, _option("--minutes", "When to stop; the rest keeps its rows.", min=0.0)] = 4.0,
    device: Annotated[str, _option("--device", "auto, cuda or cuda:N.")] = "auto",
    output: Annotated[Path | None, _option("--output", "Where to write the table.", "kernels/tiles.json")] = None,
) -> None:
    """Measure this GPU's tiles for the Triton kernels and write the table that `--backend auto` reads.

    The table is written whenever there are new rows, so a run that is killed keeps what it found.
    """
    from fastdlp.bench.tune import TABLE, format_table, print_tune
    from fastdlp.bench.tune import tune as measure_table
    from fastdlp.engine.device import DTYPES

    precisions = dtype or ["bf16", "fp32"]
    _known("--dtype", precisions, DTYPES)
    on, _ = _on(device)

    def save(tables: dict[str, Any]) -> None:
        write_atomic(output or TABLE, format_table(tables))

    _measure(lambda progress: measure_table(on, precisions, minutes, progress, save), print_tune, None, False)


@bench_app.command()
def sweep(
    method: Annotated[str, _option("--method", "One of train's methods.")] = TrainConfig.method,
    lr: Annotated[list[float] | None, _many("--lr", "Learning rates.", "3e-4, 1e-3, 3e-3, 1e-2")] = None,
    alpha: Annotated[list[float] | None, _many("--alpha", "Weights of the distillation.", "0.1, 1")] = None,
    seed: Annotated[list[int] | None, _many("--seed", "Seeds.", "0, 1, 42")] = None,
    rounds: Annotated[int, _option("--rounds", "Rounds of each member.", min=1)] = 5,
    device: Device = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """A sweep on digits beside its members as runs of their own: how much faster, and whether they are the same."""
    from fastdlp.bench.sweep import bench_sweep, print_sweep
    from fastdlp.run.sweep import Grid

    grid = Grid(tuple(lr or (3e-4, 1e-3, 3e-3, 1e-2)), tuple(alpha or (0.1, 1.0)), tuple(seed or (0, 1, 42)))
    config = TrainConfig(method=method, rounds=rounds, device=device)
    _measure(bench_sweep, print_sweep, output, as_json, config, grid)


# -- what all commands share --------------------------------------------------------------------------------


def _on(device: str) -> tuple[torch.device, bool]:
    """The device, and whether it is a GPU."""
    from fastdlp.engine.device import pick_device

    on = pick_device(device)
    return on, on.type == "cuda"


def _dtype(flag: str, given: str | None, gpu: bool) -> str:
    """The dtype that an option names, by default bf16 on a GPU."""
    from fastdlp.engine.device import DTYPES

    name = given or ("bf16" if gpu else "fp32")
    _known(flag, [name], DTYPES)
    return name


def _known(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise FastdlpError(f"unknown {flag} {name!r}: choose from {', '.join(known)}")


def _saving(output: Path | None) -> Callable[[dict[str, Any]], None]:
    """Writes the result so far, so that a killed run leaves it; a write error is reported at the end."""

    def save(result: dict[str, Any]) -> None:
        if output is not None:
            with suppress(FastdlpError):
                write_atomic(output, _json(result))

    return save


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def _measure(
    measure: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any], Console], None],
    output: Path | None,
    as_json: bool,
    *arguments: Any,
) -> None:
    """`measure(*arguments, progress=…)` with progress on stderr; write the JSON, and print it or its table.

    A file that cannot be written is reported after that.

    Exits with 1 where the result has "failed", after printing these lines on stderr.
    """
    from fastdlp.cli import console

    with console.status("preparing") as progress:
        result = measure(*arguments, progress=progress)
    try:
        if output is not None:
            write_atomic(output, _json(result))
    finally:
        if as_json:
            print(_json(result), end="")
        else:
            show(result, console.out)
    failed: Sequence[str] = result.get("failed", ())
    if failed:
        console.err.print("\n".join(failed), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)
