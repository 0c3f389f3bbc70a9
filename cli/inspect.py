"""Output of `fastdlp info` and `fastdlp data show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastdlp.adapters.bank import AdapterBank
from fastdlp.adapters.branches import AnyBranch, Tensors, tower_sites
from fastdlp.clip.load import describe, parameter_shapes
from fastdlp.config import TrainConfig
from fastdlp.data.partition_file import partition_of
from fastdlp.data.registry import load_source
from fastdlp.errors import FastdlpError
from fastdlp.methods import make_method
from fastdlp.run.build_task import branch_shapes
from fastdlp.run.metrics import exchange_metrics


def count(config: TrainConfig, classes: int | None = None) -> dict[str, Any]:
    """Parameters and bytes of a method on a model, from the resolved config alone.

    Raises FastdlpError where a method with a classifier needs the number of classes.
    """
    method = make_method(config)
    branches = method.branches()
    modules = {module for branch in branches if isinstance(branch, Tensors) for module in branch.modules}
    if "classifier" in modules and classes is None:
        raise FastdlpError(f"{method.name} has an output a class: pass --classes with their number")
    image, text = describe(config.model)
    sites = tower_sites(image if config.encoder == "image" else text) if not modules else ()
    parameters = parameter_shapes(config.model) if "encoder" in modules else {}
    shapes = branch_shapes(branches, config.encoder, parameters, image.embed, classes or 0)
    try:
        bank = AdapterBank(sites, branches, slots=1, shapes=shapes)
    except RuntimeError:  # torch's for memory that it does not get
        raise FastdlpError(
            "these adapters do not fit the memory: use a smaller --rank-local and --rank-global"
        ) from None
    exchanged = exchange_metrics(bank, method.shared)
    return {
        "model": config.model,
        "method": config.method,
        "encoder": config.encoder,
        "adapted_linears": sum(len(site.parts) for site in sites),
        "branches": {name: _kind(bank.branches[name]) | {"exchanged": name in method.shared} for name in bank.trained},
        **exchanged,
        "bytes_per_round_per_client": 2 * exchanged["uploaded_bytes_per_client_round"],
        "parameter_bytes_per_round_per_client": 2 * 4 * exchanged["uploaded_parameters"],
        "training": {name: getattr(config, name) for name in ("lr", "optimizer", "eps", "weight_decay", "rounds")},
    }


def _kind(branch: AnyBranch) -> dict[str, Any]:
    """A LoRA of some rank, or tensors of some modules."""
    if isinstance(branch, Tensors):
        return {"modules": list(branch.modules)}
    return {"rank": branch.rank, "gated": branch.gated}


def count_table(facts: dict[str, Any]) -> Table:
    """The counts, a line each."""
    table = Table(
        title=f"{facts['method']}, --encoder {facts['encoder']}, on {facts['model']}",
        title_justify="left",
        title_style="bold",
        show_header=False,
    )
    for name, branch in facts["branches"].items():
        if "modules" in branch:
            kind = " and ".join(branch["modules"])
        else:
            kind = f"LoRA of rank {branch['rank']}" + (", gated" if branch["gated"] else "")
        table.add_row(name, f"{kind}, {'exchanged' if branch['exchanged'] else 'private'}")
    for name, text in (
        *([("adapted_linears", "adapted linears")] if facts["adapted_linears"] else []),
        ("trainable_parameters", "trainable parameters, a client"),
        ("uploaded_parameters", "uploaded parameters"),
        ("bytes_per_round_per_client", "bytes a round and client, up and down"),
        ("parameter_bytes_per_round_per_client", "of these parameters, as the paper counts"),
    ):
        table.add_row(text, f"{facts[name]:,}")
    table.add_row("trained with", ", ".join(f"{name} {value}" for name, value in facts["training"].items()))
    return table


def show_partition(config: TrainConfig, picture: Path | None, as_json: bool, console: Console) -> None:
    """Print the client × class table of a partition, draw it, or both. Reads labels only, decodes nothing."""
    from fastdlp.report.partition import partition_figure, partition_table

    source = load_source(config.dataset, config.data_dir, config.download)
    partition = partition_of(config, source.labels, source.ids, source.name)
    if picture is not None:
        partition_figure(picture, partition, source.labels, source.class_names)
    if as_json:
        sides = {"train": partition.train, "test": partition.test} | ({"val": partition.val} if partition.val else {})
        classes = len(source.class_names)
        counted = {
            name: [np.bincount(source.labels[samples], minlength=classes).tolist() for samples in side]
            for name, side in sides.items()
        }
        clients = [{"client": c} | {name: rows[c] for name, rows in counted.items()} for c in range(partition.clients)]
        facts = {"class_names": source.class_names, "empty_clients": partition.empty, "clients": clients}
        print(json.dumps(facts, indent=1))
        return
    console.print(partition_table(partition, source.labels, source.class_names))
    if picture is not None:
        console.print(f"picture: {picture}", highlight=False)
