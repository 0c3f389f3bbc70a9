"""`fastdlp export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdlp.cli.options import Json
from fastdlp.errors import FastdlpError


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
    console.say(f"{out}: {exported} of {run} ({facts['method']}, {facts['encoder']} tower{rank})")
    console.say(f"load it: {facts['load']}")
