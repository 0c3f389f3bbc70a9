"""fastdlp: federated dual-LoRA fine-tuning of CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FastdlpError", "TrainConfig", "evaluate", "export_adapter", "load_adapter", "resume", "train"]

# kernels/, cli/ and bench/ lie beside this folder in a checkout and inside it once installed. When ./fastdlp
# of a checkout shadows an installed package, the three are found through the checkout itself.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from fastdlp.config import TrainConfig
    from fastdlp.errors import FastdlpError
    from fastdlp.export.api import export_adapter, load_adapter
    from fastdlp.export.evaluate import evaluate
    from fastdlp.run.train import resume, train

_PUBLIC = {
    "FastdlpError": "errors",
    "TrainConfig": "config",
    "evaluate": "export.evaluate",
    "export_adapter": "export.api",
    "load_adapter": "export.api",
    "resume": "run.train",
    "train": "run.train",
}


def __getattr__(name: str) -> Any:
    """The public names, loaded when first asked for: importing fastdlp does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastdlp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"fastdlp.{_PUBLIC[name]}"), name)
