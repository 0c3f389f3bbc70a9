"""What a replay needs: small models and data, runs of fastdlp on them with their trace, and how far two are apart.

How close. Both sides work in fp32 and add in another order, so gradients differ by about 1e-6 of their tensor's
scale. AdamW divides each element's gradient by its own running size: an element whose gradient is a millionth of its
neighbors' may move by another whole lr, and pulls others after it a little. (Against a literal loop in fp64 the run
and the literal fp32 loop stand equally far off, at the same elements.) Hence, per owner, branch and kind of tensor
(A, B, gate; every other tensor by itself), where a gap is |theirs − mine| less the rounding of the stored value, 1e-6
of its size:

    every gap                                      ≤ 2 lr      one AdamW step with a vanishing gradient's sign turned
    all but the largest 0.2 %, one at least        ≤ 0.1 lr    measured: 1e-4, at most 1e-2
    their norm, relative to what training changed  ≤ 2e-3      measured: 3e-6, at most 4e-4
    nine gaps in ten                               ≤ 3e-3 lr   measured: 1e-5, at most 8e-4

Broken algorithms miss the norm by ten times at least, most by a hundred; AdamW with eps 1e-7 for 1e-8 by thirty.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdlp
from fastdlp import TrainConfig
from fastdlp.clip.tokenizer import ByteTokenizer
from fastdlp.data.partition import Partition
from fastdlp.data.partition_file import save_partition
from fastdlp.data.registry import load_source
from fastdlp.data.sources import ImageSource
from tests.literal import DEFAULTS, PROTOCOLS, Federation, Settings
from tests.sharing import once

EACH, MOST, STRAY, NORM, BULK, ROUNDING = 2.0, 0.1, 2e-3, 2e-3, 3e-3, 1e-6  # see above
BROKEN = 10 * NORM
LOSS = {"rel": 1e-4, "abs": 2e-5}  # of fp32 logits near 10 after some steps; measured: 1.3e-5
BATCH, ROUNDS = 16, 3
ASSETS = Path(fastdlp.__file__).parent / "assets"

# Training and test samples of each client: one sample, a last batch of one sample, no test sample, no training sample.
SIZES = {"digits": ((1, 10), (33, 12), (40, 0), (0, 5)), "folder": ((1, 3), (17, 6), (20, 0), (0, 3))}
# Contrastive loss and class distillation: at the start a lone sample's gradient is exactly zero, and AdamW makes whole
# steps of its rounding. So in the two cases that mix them no client has a lone sample.
SIZES["pairs"] = ((2, 3), (18, 6), (20, 0), (0, 3))

# Other widths everywhere than glyph-clip; CLIP's own activation and tokenizer.
TINY: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 40,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 36, "patch_size": 12, "width": 48, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.25, 0.2],
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    },
}
# What other ViTs of open_clip have: LayerScale, pooling of all tokens, no causal mask, a projection with bias.
ODD: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 30,
            "patch_size": 10,
            "width": 32,
            "layers": 2,
            "head_width": 8,
            "mlp_ratio": 2.0,
            "ls_init_value": 0.5,
            "no_ln_pre": True,
            "pool_type": "avg",
            "final_ln_after_pool": True,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 4,
            "layers": 2,
            "mlp_ratio": 3.0,
            "ls_init_value": 0.5,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
MODELS = {"tiny": TINY, "odd": ODD}


@dataclass(frozen=True)
class Case:
    """One run: a model with the data that goes with it, and options of TrainConfig."""

    model: str
    given: tuple[tuple[str, Any], ...]

    @property
    def data(self) -> str:
        """The partition, by its name in SIZES."""
        if self.model == "glyph-clip":
            return "digits"
        settings = self.settings()
        return "pairs" if (settings.task_loss, settings.kd_logits) == ("contrastive", "class") else "folder"

    @property
    def options(self) -> dict[str, Any]:
        """Options that make little training count: gates reach zero, distillation weighs."""
        common = {"method": "feddlp", "encoder": "image", "lr": 1e-3, "xi": 0.01, "alpha": 0.5}
        return common | {"rounds": ROUNDS, "batch_size": BATCH, "seed": 3} | dict(self.given)

    def settings(self, **changes: Any) -> Settings:
        """The same for the literal implementation, with some settings changed on purpose."""
        options = self.options
        values = PROTOCOLS[options.get("protocol", "paper")] | DEFAULTS.get(options["method"], {})
        values |= {"rank_local": 4 if options["method"] in ("feddlp", "combined") else 2}
        names = {f.name for f in dataclasses.fields(Settings)}
        values |= {name: value for name, value in options.items() if name in names and value is not None}
        values.setdefault("gate_lr", values["lr"])
        if "transform" in options:
            values["resize"] = {"model": None, "squash": "squash"}[options["transform"]]
        return Settings(**values | changes)


def make_case(model: str = "glyph-clip", **options: Any) -> Case:
    return Case(model, tuple(sorted(options.items())))


# -- models, data and runs -------------------------------------------------------------------------------------


def make_model(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A folder that `local-dir:` takes, with random weights, biases and norms included.

    Tokens differ much and attention is sharp, as in a trained model; at CLIP's own initial scale captions are so
    alike that their gradients drown in rounding.
    """
    torch.manual_seed(seed)
    net = open_clip.CLIP(**config["model_cfg"])
    with torch.no_grad():
        net.token_embedding.weight *= 40
        net.positional_embedding *= 20
        for block in [*net.transformer.resblocks, *net.visual.transformer.resblocks]:
            block.attn.in_proj_weight *= 2
            block.mlp.c_fc.weight *= 2
        for name, p in net.named_parameters():
            if name.endswith(("bias", "gamma")) or ".ln_" in name or name.startswith("ln_"):
                p += 0.1 * torch.randn_like(p)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, folder / "open_clip_model.safetensors")


def make_images(folder: Path, classes: int = 4, each: int = 13) -> None:
    """Blurred noise on a class's color, wide and tall."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"kind_{c}").mkdir(parents=True)
        color = rng.uniform(60, 200, 3)
        for i in range(each):
            coarse = np.clip(color + rng.normal(0, 50, (5, 5, 3)), 0, 255).astype(np.uint8)
            size = (40 + 4 * (i % 5), 60 - 4 * (i % 7))
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"kind_{c}/{i:02d}.png")


def make_partition(path: Path, source: ImageSource, sizes: tuple[tuple[int, int], ...]) -> None:
    """Consecutive pieces of a shuffle, so that classes are mixed."""
    order = np.random.default_rng(1).permutation(len(source))
    ends = np.cumsum([n for pair in sizes for n in pair])
    assert ends[-1] <= len(order)
    parts = [np.sort(part) for part in np.split(order, ends)[:-1]]
    train, test = parts[0::2], parts[1::2]
    save_partition(path, Partition(train, test, "by hand", None, None, 0, 0.25, dataset=source.name), source.ids)


class Workshop:
    """The models and data of this file's cases, and their runs, in a folder that other processes may use too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for seed, (name, config) in enumerate(MODELS.items()):
            once(root / name, functools.partial(make_model, config=config, seed=seed))
        folder = f"folder:{once(root / 'images', make_images)}"
        self.datasets = {"digits": "digits", "folder": folder, "pairs": folder}
        self.sources = {data: load_source(name) for data, name in self.datasets.items()}
        for data, source in self.sources.items():
            once(root / f"{data}.json", functools.partial(make_partition, source=source, sizes=SIZES[data]))
        self.members = {data: json.loads((root / f"{data}.json").read_text())["clients"] for data in SIZES}
        self.clip = functools.cache(self._clip)
        self.run = functools.cache(self._run)
        self.images = functools.cache(self._images)

    def _clip(self, model: str) -> tuple[open_clip.CLIP, dict[str, Any], Any]:
        """Module, preprocessing and tokenizer."""
        if model == "glyph-clip":
            config, weights = json.loads((ASSETS / "glyph-clip.json").read_text()), ASSETS / "glyph-clip.safetensors"
            tokenizer: Any = ByteTokenizer(config["model_cfg"]["text_cfg"]["context_length"])
        else:
            config, weights = MODELS[model], self.root / model / "open_clip_model.safetensors"
            tokenizer = open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])
        net = open_clip.CLIP(**config["model_cfg"])
        net.load_state_dict(load_file(weights))
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        return net.eval(), {"image_size": size} | config["preprocess_cfg"], tokenizer

    def ids(self, data: str) -> list[str]:
        """The samples that clients hold; the literal implementation counts them in this order."""
        return [name for member in self.members[data].values() for side in ("train", "test") for name in member[side]]

    def _images(self, model: str, data: str, resize: str | None) -> Tensor:
        _, preprocess, _ = self.clip(model)
        options = {k: preprocess[k] for k in ("image_size", "mean", "std", "interpolation", "resize_mode")}
        transform = image_transform(is_train=False, **options | ({"resize_mode": resize} if resize else {}))
        source = self.sources[data]
        return torch.stack([transform(source.open(source.ids.index(name))) for name in self.ids(data)])

    def federation(self, case: Case, kind: type[Federation] = Federation, **changes: Any) -> Federation:
        """A literal federation for a case, adapters not set."""
        settings = case.settings(**changes)
        clip, _, tokenizer = self.clip(case.model)
        source, ids = self.sources[case.data], self.ids(case.data)
        number = {name: i for i, name in enumerate(ids)}
        clients = [
            ([number[name] for name in member["train"]], [number[name] for name in member["test"]])
            for member in self.members[case.data].values()
        ]
        labels = torch.tensor([int(source.labels[source.ids.index(name)]) for name in ids])
        images = self.images(case.model, case.data, settings.resize)
        template = case.options.get("template", source.template)
        return kind(settings, clip, tokenizer, source.class_names, template, images, labels, clients)

    def _run(self, case: Case) -> Path:
        """The folder of a finished run of fastdlp."""
        model = case.model if case.model == "glyph-clip" else f"local-dir:{self.root / case.model}"
        dataset, partition = self.datasets[case.data], str(self.root / f"{case.data}.json")

        def train(out: Path) -> None:
            fastdlp.train(
                TrainConfig(
                    model=model,
                    dataset=dataset,
                    partition=partition,
                    device="cpu",
                    trace=True,
                    out=str(out),
                    **case.options,
                )
            )

        return once(self.root / f"run-{hashlib.sha256(repr(case).encode()).hexdigest()[:16]}", train)

    def batches(self, case: Case, number: int) -> list[tuple[int, list[int]]]:
        """(client, samples) of one round, in the trace's order."""
        index = {name: i for i, name in enumerate(self.ids(case.data))}
        lines = read_lines(self.run(case) / "trace/batches.jsonl")
        return [(line["client"], [index[s] for s in line["samples"]]) for line in lines if line["round"] == number]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trace(run: Path, number: int) -> dict[str, Tensor]:
    return load_file(run / f"trace/round-{number:04d}.safetensors")


# -- comparing ---------------------------------------------------------------------------------------------------


@dataclass
class Distance:
    """How far two sets of tensors are apart, the worst of their groups, each 1 at its bound."""

    bulk: float = 0.0
    norm: float = 0.0
    most: float = 0.0
    each: float = 0.0
    where: str = ""

    def note(self, where: str, theirs: Tensor, mine: Tensor, start: Tensor, lr: float) -> None:
        """Count in one group, flattened."""
        theirs, mine, start = theirs.double(), mine.double(), start.double()
        rounding = ROUNDING * mine.abs()
        gap = ((theirs - mine).abs() - rounding).clamp(min=0)
        kept = gap.sort().values[: len(gap) - math.ceil(STRAY * len(gap))]
        found = {
            "bulk": float(gap.quantile(0.9)) / (BULK * lr),
            "norm": float(kept.norm() / (NORM * (mine - start).norm()).clamp(min=1e-30)),
            "most": float(kept.max()) / (MOST * lr),
            "each": float(gap.max()) / (EACH * lr),
        }
        if max(found.values()) > self.worst():
            self.where = where
        for name, value in found.items():
            setattr(self, name, max(getattr(self, name), value))

    def worst(self) -> float:
        """More than 1: a bound is broken."""
        return max(self.bulk, self.norm, self.most, self.each)


def determined(name: str, tensor: Tensor) -> Tensor:
    """What of a tensor the loss depends on, flat: a softmax over keys does not see their bias."""
    flat, third = tensor.flatten(), len(tensor) // 3
    return torch.cat([flat[:third], flat[2 * third :]]) if name.endswith("in_proj_bias") else flat


def compare(theirs: dict[str, Tensor], mine: dict[str, Tensor], start: dict[str, Tensor], lr: float) -> Distance:
    """Tensors of equal names, grouped by owner, adapter and kind; `start` is where training began."""
    assert theirs.keys() == mine.keys()
    groups: dict[str, list[str]] = {}
    for name in theirs:
        assert theirs[name].dtype == torch.float32
        assert theirs[name].shape == mine[name].shape, name
        owner, branch, *_, kind = name.split("/")
        pooled = kind in ("A", "B", "gate")
        groups.setdefault(f"{owner}/{branch}/*/{kind}" if pooled else name, []).append(name)
    distance = Distance()
    for where, names in groups.items():
        a, b, c = (torch.cat([determined(name, tensors[name]) for name in names]) for tensors in (theirs, mine, start))
        distance.note(where, a, b, c, lr)
    return distance


def replay_round(workshop: Workshop, case: Case, federation: Federation, number: int) -> tuple[Distance, Any]:
    """Train and aggregate one round; the distance from the run's, and the literal losses."""
    losses = federation.train(workshop.batches(case, number))
    mine = {name: t.clone() for name, t in federation.tensors().items() if not name.startswith("server/")}
    federation.aggregate()
    mine |= {name: t.clone() for name, t in federation.tensors().items() if name.startswith("server/")}
    run = workshop.run(case)
    return compare(trace(run, number), mine, trace(run, 0), case.settings().lr), losses


def pooled(per_client: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    names = next(losses for losses in per_client if losses)
    total = sum(sizes)
    return {name: sum(n * x.get(name, 0.0) for x, n in zip(per_client, sizes)) / total for name in names}
