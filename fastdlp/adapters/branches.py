"""Branches, what a client trains: LoRA on a tower's linears, a head on the encoder's output, or the encoder itself.

Also the linears of a CLIP tower that carry adapters (sites) and their sizes. Needs neither weights nor torch.

Adapted linears (paper section IV; spec of FEDDLP's code): q, k and v, each with an adapter of its own
although the model packs them into one weight; the attention's output projection; fc1 and fc2; in every
block; and the tower's final projection.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a transformer tower: `mlp` is fc1's output, `embed` the joint image-text space."""

    layers: int
    width: int
    mlp: int
    embed: int


@dataclass(frozen=True)
class Site:
    """One frozen weight with `len(parts)` adapters, [len(parts) · out_features, in_features]."""

    name: str
    parts: tuple[str, ...]
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Branch:
    """A LoRA on every site that a client holds: `local` or `global`. scale = lora_alpha / rank.

    copy_of: the branch that this one is a frozen copy of, refreshed at the start of a round; a copy is never trained,
    exchanged or saved.
    """

    name: str
    rank: int
    gated: bool
    lora_alpha: float = 16.0
    copy_of: str | None = None

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.rank


@dataclass(frozen=True)
class Tensors:
    """Whole tensors that a client trains instead of LoRA.

    modules: "attention" and "classifier" are heads on the encoder's output (`fastdlp.adapters.heads`); "encoder" is
    every weight of the encoder itself.
    """

    name: str
    modules: tuple[str, ...]


AnyBranch = Branch | Tensors


def tower_sites(shape: TowerShape) -> tuple[Site, ...]:
    """All sites of a tower, in forward order: per block `{i}.qkv`, `{i}.out`, `{i}.fc1`, `{i}.fc2`; then `proj`."""
    sites: list[Site] = []
    w = shape.width
    for i in range(shape.layers):
        sites += [
            Site(f"{i}.qkv", (f"{i}.q", f"{i}.k", f"{i}.v"), w, w),
            Site(f"{i}.out", (f"{i}.out",), w, w),
            Site(f"{i}.fc1", (f"{i}.fc1",), w, shape.mlp),
            Site(f"{i}.fc2", (f"{i}.fc2",), shape.mlp, w),
        ]
    sites.append(Site("proj", ("proj",), w, shape.embed))
    return tuple(sites)
