"""What every form of a federated round is to a benchmark, and the losses of its first steps."""

from __future__ import annotations

from typing import Protocol

import numpy as np

Losses = dict[str, np.ndarray]  # by name: [steps, clients] fp64


class Runner(Protocol):
    """A form set up for one problem, with its own copy of everything that it trains."""

    def first_steps(self) -> Losses:
        """From the start: each client's first two batches, the average, and each client's third batch."""

    def round(self) -> object:
        """One epoch of every client and the average. What is returned on a GPU may still be computed."""

    def step(self) -> object:
        """One batch of every client, whose operations can be counted."""
