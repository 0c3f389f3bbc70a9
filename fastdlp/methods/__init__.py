"""The federated methods by name."""

from __future__ import annotations

from fastdlp.config import TrainConfig
from fastdlp.errors import FastdlpError
from fastdlp.methods.base import Method
from fastdlp.methods.combined import Combined
from fastdlp.methods.feddat import FedDAT
from fastdlp.methods.feddlp import FedDLP
from fastdlp.methods.flora import FedAA, FedCLIP, FedFFT, FedLC, FedVMLC, FLoRA
from fastdlp.methods.local import Local, LocalSoRA

_ALL: tuple[type[Method], ...] = (
    FedDLP,
    FLoRA,
    FedDAT,
    Combined,
    FedCLIP,
    Local,
    LocalSoRA,
    FedFFT,
    FedVMLC,
    FedLC,
    FedAA,
)
METHODS = {method.name: method for method in _ALL}


def make_method(config: TrainConfig) -> Method:
    """The method that `config.method` names.

    Raises:
        FastdlpError: unknown name (lists the known ones), or options that it does not support.
    """
    return _class_of(config)(config)


def resolve(config: TrainConfig) -> TrainConfig:
    """`config.resolved()` with the method's own defaults.

    Raises:
        FastdlpError: as `make_method`, and invalid values.
    """
    method = _class_of(config)
    resolved = config.resolved(method.defaults, method.demonstration)
    method(resolved)
    return resolved


def _class_of(config: TrainConfig) -> type[Method]:
    if config.method not in METHODS:
        raise FastdlpError(f"unknown --method {config.method!r}: choose from {', '.join(METHODS)}")
    return METHODS[config.method]
