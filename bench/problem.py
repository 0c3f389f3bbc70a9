"""What every variant of a federated round computes on, and what it offers to the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdlp.clip.load import Clip, class_prompts, load_clip
from fastdlp.data.cache import Pixels

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
# By precision, so that an update shows in the next losses and rounding does not. At 1e-4 in fp32, entries whose first
# Adam step changes sign by rounding (19 of 334,336 in fastdlp, 28 in PEFT, by fp64) move a divergence by 4 % two steps
# later; 1e-5 is too small for bf16.
LR = {"fp32": 1e-5, "bf16": 1e-4}
CHECKED = 3  # steps of every client whose losses are compared
SEED = 6  # of the images; with some others a small model's losses change less by a missing average than is allowed

Losses = dict[str, np.ndarray]  # by name: [steps, clients] fp64


@dataclass(frozen=True)
class Problem:
    """A model and the samples of all clients, numbered client by client and batch by batch.

    Attributes:
        clip: random weights.
        data: random images and labels, and the template of the class prompts.
        clients: that hold equally many samples.
        batch: images of a client's batch.
        steps: batches of every client in a round: the first of its batches, of which there are at least CHECKED.
        lr: of every variant's optimizer.
    """

    clip: Clip
    data: Pixels
    clients: int
    batch: int
    steps: int
    lr: float = LR["fp32"]

    def samples(self, client: int, steps: range) -> np.ndarray:
        """Sample numbers of a client's batches."""
        by_batch = np.arange(len(self.data.labels)).reshape(self.clients, -1, self.batch)
        return by_batch[client, steps.start : steps.stop].ravel()

    @property
    def pixels(self) -> Tensor:
        """[clients, batches, batch, 3, S, S] normalized fp32."""
        pixels = self.clip.transform.normalize(torch.from_numpy(self.data.data))
        return pixels.unflatten(0, (self.clients, -1, self.batch))

    @property
    def labels(self) -> Tensor:
        """[clients, batches, batch] int64."""
        return torch.from_numpy(self.data.labels).view(self.clients, -1, self.batch)

    @property
    def ids(self) -> Tensor:
        """[K, context] token ids of the class prompts."""
        return self.clip.tokenize(class_prompts(self.data.class_names, self.data.template))


def make_problem(model: str, batch: int, clients: int = 1, steps: int = 1, template: str = TEMPLATE) -> Problem:
    """Random weights and images, which do not change the speed, and the prompts of Pets."""
    clip = load_clip(model, "none")
    images = clients * max(steps, CHECKED) * batch
    return Problem(clip, random_images(images, clip.transform.size, template), clients, batch, steps)


def random_images(count: int, size: int, template: str = TEMPLATE) -> Pixels:
    """A data set of random images and labels, with the classes of Pets."""
    rng = np.random.default_rng(SEED)
    images = rng.integers(0, 256, (count, 3, size, size), np.uint8)
    labels, ids = rng.integers(0, CLASSES, count), [str(number) for number in range(count)]
    return Pixels("random", [*PETS], template, labels, ids, images, [], "")


class Rounds(Protocol):
    """A variant of the round with its own copy of everything that it trains."""

    def first_steps(self) -> Losses:
        """From the initial adapters: two batches of each client, the average, and a third batch of each client."""

    def round(self) -> object:
        """One epoch of every client and the average; a GPU may still be computing when it returns."""
