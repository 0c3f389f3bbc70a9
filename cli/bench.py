"""`fastdlp bench`: what is measured, on whatever machine this is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError

bench_app = typer.Typer(no_args_is_help=True, help="Measure, beside PEFT in the same run.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Output = Annotated[Path | None, typer.Option("--output", help="Also write the result as JSON to this file.")]


@bench_app.command()
def step(
    model: Annotated[
        str, typer.Option("--model", help="An open_clip model; its weights are random here.")
    ] = "ViT-B-32-quickgelu",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = TrainConfig.batch_size,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, bf16; may be given twice.", show_default="both"),
    ] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients that step together.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed steps of each form.")] = 7,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """One FEDDLP step of one or more clients beside the same step written with PEFT."""
    from fastdlp.bench.report import print_step
    from fastdlp.bench.step import bench_step
    from fastdlp.cli import console
    from fastdlp.federation import DTYPES, pick_device
    from fastdlp.files import write_atomic

    precisions = precision or ["fp32", "bf16"]
    if unknown := [p for p in precisions if p not in DTYPES]:
        raise FastdlpError(f"unknown --precision {unknown[0]!r}: choose from {', '.join(DTYPES)}")
    with console.err.status("preparing") as status:
        result = bench_step(model, batch_size, precisions, repeats, pick_device(device), status.update, clients)
    if output is not None:
        write_atomic(output, json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_step(result, console.out)


@bench_app.command()
def demonstration(
    output: Output = None,
) -> None:
    """Every method on the embedded digits, both encoders, β 0.1 and 0.01, three seeds, as a Markdown table."""
    import torch

    from fastdlp.bench.demonstration import demonstrate, markdown
    from fastdlp.bench.step import machine
    from fastdlp.cli import console
    from fastdlp.files import write_atomic

    with console.err.status("preparing") as status:
        rows = demonstrate(status.update)
    if output is not None:
        facts = {"command": "fastdlp bench demonstration", **machine(torch.device("cpu")), "torch": torch.__version__}
        write_atomic(output, json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(markdown(rows), end="")
