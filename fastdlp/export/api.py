"""`export_adapter` and `load_adapter`, what the command line and Python callers use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastdlp.clip.load import model_config
from fastdlp.config import EMBEDDED_MODEL
from fastdlp.errors import FastdlpError
from fastdlp.export.adapter import LoRA
from fastdlp.export.file_format import read_adapter, write_adapter, write_weights
from fastdlp.export.open_clip_format import write_merged
from fastdlp.export.peft_format import CONFIG, PICKLE, read_peft, twin, write_peft
from fastdlp.export.trained import Trained, read_trained

FORMATS = ("peft", "open_clip", "safetensors")


def export_adapter(run: str | Path, out: str | Path, format: str = "peft", client: int | None = None) -> dict[str, Any]:
    """Write what a finished run has trained in a form that other programs read.

    Args:
        run: its folder.
        out: where to; must be free. A folder for "peft"; a file ending in .safetensors for "safetensors"; either
            for "open_clip".
        format: "peft": PEFT's adapter for transformers' CLIPModel. "open_clip": the frozen model with the adapter
            added to its weights. "safetensors": one file, its layout in `fastdlp.export.file_format`.
        client: whose personal model; None for the server's adapter.

    Returns:
        `run`, `client` (None: the server's), `format`, `out`, `method`, `encoder`, `rank` and `lora_alpha` (None for
        methods without LoRA), `load` (how to load it).

    Raises:
        FastdlpError: an unknown format, a place that is taken, no such client or global adapter, an unfinished run,
            or a method or model that the format cannot hold.
    """
    if format not in FORMATS:
        raise FastdlpError(f"unknown --format {format!r}: choose from {', '.join(FORMATS)}")
    path = Path(out)
    if os.path.lexists(path):
        raise FastdlpError(f"{out} exists: name another --out")
    trained = read_trained(run, client)
    load = {"peft": _peft, "open_clip": _open_clip, "safetensors": _safetensors}[format](path, trained)
    adapter = trained.adapter
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
    """An adapter from elsewhere: PEFT's folder, or a file that `fastdlp export --format safetensors` wrote.

    Nothing is unpickled.

    Raises:
        FastdlpError: what is there is none, is damaged, or is an adapter of another kind than a plain LoRA of one
            of CLIP's towers.
    """
    path = Path(path)
    if not path.exists():
        raise FastdlpError(f"{path} does not exist: name PEFT's folder or a .safetensors file")
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise FastdlpError(f"{path} does not end in .safetensors: no other file is read, least of all a pickle")
        return read_adapter(path)
    if (path / "open_clip_config.json").is_file():
        raise FastdlpError(f"{path} is a whole model: use it as --model local-dir:{path}")
    if not (path / CONFIG).is_file():
        pickle = f" but a pickle, {PICKLE}" if (path / PICKLE).is_file() else ""
        raise FastdlpError(f"{path} holds no {CONFIG}{pickle}: name PEFT's folder or a .safetensors file")
    return read_peft(path)


def _peft(path: Path, trained: Trained) -> str:
    if trained.adapter is None:
        raise FastdlpError(
            f"{trained.config.method} trains no LoRA, which is all that PEFT's folder holds: use {_instead(trained)}"
        )
    if path.suffix == ".safetensors":
        raise FastdlpError(f"--format peft makes a folder: let --out be a name without {path.suffix}")
    write_peft(path, trained.adapter, model_config(trained.config.model))
    base = twin(trained.about["model"], trained.about["pretrained"])
    loaded = f'CLIPModel.from_pretrained("{base}")' if base else "model"
    name = trained.about["model"]
    hint = (
        ""
        if base
        else (
            f", where model is a transformers CLIPModel that you have made of the weights of {name}: none at "
            "the hub is known to have them, and --format open_clip needs none"
        )
    )
    return f'PeftModel.from_pretrained({loaded}, "{path}"){hint}'


def _open_clip(path: Path, trained: Trained) -> str:
    name = write_merged(path, trained)
    if path.suffix != ".safetensors":
        return f'open_clip.create_model("{name}"), or fastdlp\'s --model {name}'
    ours = f"--model {name} --pretrained {path}"
    return ours if name == EMBEDDED_MODEL else f'open_clip.create_model("{name}", pretrained="{path}"), or {ours}'


def _safetensors(path: Path, trained: Trained) -> str:
    if path.suffix != ".safetensors":
        raise FastdlpError("--format safetensors makes a file: let --out end in .safetensors")
    if trained.adapter is None:
        write_weights(path, trained.weights, trained.about)
        return f'safetensors.torch.load_file("{path}")'
    write_adapter(path, trained.adapter)
    return f'fastdlp.load_adapter("{path}")'


def _instead(trained: Trained) -> str:
    whole = not any("/" in name for name in trained.weights)
    return "--format open_clip or safetensors" if whole else "--format safetensors"
