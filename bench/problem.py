"""What every variant of a federated round computes on, and what it offers to the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdlp.clip.load import Clip, class_prompts, load_clip
from fastdlp.engine.tasks import Prompts, frozen_text_features

# Classes of Oxford-IIIT Pets
PETS = (
    "Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal", "Birman",
    "Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel", "English Setter",
    "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond", "Leonberger", "Maine Coon",
    "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug", "Ragdoll", "Russian Blue", "Saint Bernard",
    "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese", "Sphynx", "Staffordshire Bull Terrier", "Wheaten Terrier",
    "Yorkshire Terrier",
)  # fmt: skip
TEMPLATE = "a photo of a {}."
CLASSES = len(PETS)
ALPHA = 0.1
# By precision, so that an update shows in the next losses and rounding does not. At 1e-4 in fp32, entries whose first
# Adam step changes sign by rounding (19 of 334,336 in fastdlp, 28 in PEFT, by fp64) move a divergence by 4 % two steps
# later; 1e-5 is too small for bf16.
LR = {"fp32": 1e-5, "bf16": 1e-4}
CHECKED = 3  # steps of every client whose losses are compared

Losses = dict[str, np.ndarray]  # by name: [steps, clients] fp64


@dataclass(frozen=True)
class Problem:
    """Images and labels of every client and batch, and the class prompts.

    Shapes: pixels [clients, batches, batch, 3, S, S] normalized fp32; labels [clients, batches, batch]; ids
    [K, context] token ids of the prompts; text [K, d] their normalized features by the frozen text tower, fp32. A round
    takes the first `steps` batches of each client; there are at least CHECKED. lr: of every variant's optimizer.
    """

    clip: Clip
    pixels: Tensor
    labels: Tensor
    ids: Tensor
    text: Tensor
    steps: int
    lr: float = LR["fp32"]

    @property
    def clients(self) -> int:
        return self.pixels.shape[0]

    @property
    def batch(self) -> int:
        return self.pixels.shape[2]

    def samples(self, client: int, steps: range) -> range:
        """Sample numbers of a client's batches; samples are numbered client by client and batch by batch."""
        first = client * self.pixels.shape[1]
        return range((first + steps.start) * self.batch, (first + steps.stop) * self.batch)

    def small(self, clients: int) -> Problem:
        """Fewer clients with two images a batch and one batch a round, to count operations."""
        return replace(self, pixels=self.pixels[:clients, :, :2], labels=self.labels[:clients, :, :2], steps=1)


def make_problem(
    model: str, batch: int, clients: int = 1, steps: int = 1, seed: int = 0, template: str = TEMPLATE
) -> Problem:
    """Random weights and images, which do not change the speed, and the prompts of Pets."""
    clip = load_clip(model, "none", seed)
    generator = torch.Generator().manual_seed(seed)
    size, batches = clip.transform.size, max(steps, CHECKED)
    pixels = torch.randn(clients, batches, batch, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (clients, batches, batch), generator=generator)
    ids = clip.tokenize(class_prompts(PETS, template))
    with torch.no_grad():
        text = F.normalize(frozen_text_features(clip.text, Prompts(*clip.text_stem(ids))), dim=-1)
    return Problem(clip, pixels, labels, ids, text, steps)


class Rounds(Protocol):
    """A variant of the round with its own copy of everything that it trains."""

    def first_steps(self) -> Losses:
        """From the initial adapters: two batches of each client, the average, and a third batch of each client."""

    def round(self) -> object:
        """One epoch of every client and the average; a GPU may still be computing when it returns."""

    def step(self) -> object:
        """One batch of every client."""
