"""The images of a step: stem tokens or pixels resident on the device, or pixels copied there per batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdlp.clip.stem import ImageStem

FROZEN_BATCH = 64  # images per pass through the frozen stem or tower


class PixelSource(Protocol):
    """Pixels by sample number."""

    def __len__(self) -> int: ...

    def __call__(self, samples: np.ndarray) -> Tensor:
        """[n] sample numbers → [n, 3, S, S] on the CPU: uint8, or fp32 if stored normalized."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """The model's input, fp32, on the device of `pixels`."""


def stage(pixels: PixelSource, device: torch.device, samples: np.ndarray) -> Tensor:
    """Copy the pixels of samples to the device, asynchronously."""
    held = pixels(samples)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


class TokenSource:
    """The stem's tokens of samples.

    Tokens are resident on the device if they fit `bound` bytes; the stem then runs once per image. Otherwise pixels
    are, if they fit; otherwise the pixels of every batch are copied (`stage`).

    Args:
        stem: frozen image stem, on the device, fp32.
        pixels: of all samples.
        device, dtype: of the tokens.
        bound: bytes.
    """

    def __init__(
        self, stem: ImageStem, pixels: PixelSource, device: torch.device, dtype: torch.dtype, bound: int
    ) -> None:
        self.stem, self.pixels, self.device, self.dtype = stem, pixels, device, dtype
        self.tokens: Tensor | None = None
        self.resident: Tensor | None = None
        one = pixels(np.arange(1))[0]
        if len(pixels) * stem.positions.numel() * dtype.itemsize <= bound:
            self.tokens = torch.empty(len(pixels), *stem.positions.shape, dtype=dtype, device=device)
        elif len(pixels) * one.numel() * one.element_size() <= bound:
            self.resident = torch.empty(len(pixels), *one.shape, dtype=one.dtype, device=device)
        held = self.tokens if self.resident is None else self.resident
        if held is None:
            return
        for part in np.array_split(np.arange(len(pixels)), max(1, -(-len(pixels) // FROZEN_BATCH))):
            batch = stage(pixels, device, part)
            held[part[0] : part[-1] + 1] = batch if self.tokens is None else self._run(batch)

    @property
    def stage(self) -> Callable[[np.ndarray], Tensor] | None:
        """Copies the pixels of a batch to the device; None if tokens or pixels are resident."""
        return partial(stage, self.pixels, self.device) if self.tokens is None and self.resident is None else None

    def __call__(self, ids: Tensor, staged: Tensor | None) -> Tensor:
        """[m] sample numbers on the device and their staged pixels, if any → [m, T, width]."""
        if self.tokens is not None:
            return self.tokens.index_select(0, ids)
        if self.resident is not None:
            return self._run(self.resident.index_select(0, ids))
        assert staged is not None
        return self._run(staged)

    def _run(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.stem(self.pixels.normalize(pixels)).to(self.dtype)
