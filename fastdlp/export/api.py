"""`export_adapter` and `load_adapter`, for the command line and Python callers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.file_format import export_file, read_adapter
from fastdlp.export.open_clip_format import export_merged
from fastdlp.export.peft_format import CONFIG, PICKLE, export_peft, read_peft
from fastdlp.export.trained import read_trained

# Functions that write a `Trained` to a path and return how to load it.
FORMATS = {"peft": export_peft, "open_clip": export_merged, "safetensors": export_file}


def export_adapter(run: str | Path, out: str | Path, format: str = "peft", client: int | None = None) -> dict[str, Any]:
    """Write the trained part of a finished run in a format of other programs.

    Args:
        run: its folder.
        out: must not exist. A folder for "peft"; a file ending in .safetensors for "safetensors"; either
            for "open_clip".
        format: "peft": PEFT's adapter for transformers' CLIPModel. "open_clip": the frozen model with the adapter
            added to its weights. "safetensors": one file, its layout in `fastdlp.export.file_format`.
        client: export this client's personal model; None for the server's adapter.

    Returns:
        `run`, `client` (None: the server's), `format`, `out`, `method`, `encoder`, `rank` and `lora_alpha` (None for
        methods without LoRA), `load` (how to load it).

    Raises:
        FastdlpError: an unknown format, an `out` that exists, no such client or global adapter, an unfinished run,
            or a method or model that the format cannot express.
    """
    if format not in FORMATS:
        raise FastdlpError(f"unknown --format {format!r}: choose from {', '.join(FORMATS)}")
    path = Path(out)
    if os.path.lexists(path):
        raise FastdlpError(f"{out} exists: name another --out")
    trained = read_trained(run, client)
    load, adapter = FORMATS[format](path, trained), trained.adapter
    return {
        "run": str(run),
        "client": client,
        "format": format,
        "out": str(out),
        "method": trained.config.method,
        "encoder": trained.config.encoder,
        "rank": adapter.rank if adapter else None,
        "lora_alpha": adapter.lora_alpha if adapter else None,
        "load": load,
    }


def load_adapter(path: str | Path) -> LoRA:
    """Read an external adapter: PEFT's folder, or a file that `fastdlp export --format safetensors` wrote.

    Nothing is unpickled.

    Raises:
        FastdlpError: not an adapter, damaged, or not a plain LoRA of one of CLIP's towers.
    """
    path = Path(path)
    if not path.exists():
        raise FastdlpError(f"{path} does not exist: name PEFT's folder or a .safetensors file")
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise FastdlpError(f"{path} does not end in .safetensors: no other file is read")
        return read_adapter(path)
    if (path / "open_clip_config.json").is_file():
        raise FastdlpError(f"{path} is a whole model: use it as --model local-dir:{path}")
    if not (path / CONFIG).is_file():
        pickle = f" but a pickle, {PICKLE}" if (path / PICKLE).is_file() else ""
        raise FastdlpError(f"{path} holds no {CONFIG}{pickle}: name PEFT's folder or a .safetensors file")
    return read_peft(path)
