"""The federated methods by name."""

from __future__ import annotations

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods.base import Method
from fastdlp.methods.feddlp import FedDLP
from fastdlp.methods.flora import FLoRA
from fastdlp.methods.local import Local

_ALL: tuple[type[Method], ...] = (FedDLP, FLoRA, Local)
METHODS = {method.name: method for method in _ALL}


def make_method(config: TrainConfig) -> Method:
    """The method that `config.method` names.

    Raises:
        FastdlpError: unknown name; lists the known ones.
    """
    if config.method not in METHODS:
        raise FastdlpError(f"unknown --method {config.method!r}: choose from {', '.join(METHODS)}")
    return METHODS[config.method](config)
