"""CLIP's evaluation transform in two parts, so that the result of the expensive one can be cached as bytes.

`to_uint8` resizes and crops (once per image, on the CPU); `normalize` subtracts the mean and divides by the standard
deviation (every step, on any device). Together they equal open_clip's evaluation transform bitwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastdlp.errors import FastdlpError

# Of OpenAI's CLIP; open_clip also assumes them of a checkpoint file.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Transform:
    """An evaluation transform of CLIP.

    Attributes:
        size: side S of the model's input, in pixels.
        resize_mode: "shortest" scales the shorter side to S and crops the center; "squash" scales both to S.
        interpolation: "bicubic" or "bilinear".
        mean, std: per channel, for values in 0..1.
    """

    size: int
    resize_mode: Literal["shortest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FastdlpError(f"the image size is {self.size}: use at least 1")
        if self.resize_mode not in ("shortest", "squash"):
            raise FastdlpError(f"unknown resize mode {self.resize_mode!r}: use shortest or squash")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise FastdlpError(f"unknown interpolation {self.interpolation!r}: use bicubic or bilinear")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(std > 0 for std in self.std):
            raise FastdlpError("mean and std need three numbers each, and std must be positive")

    def to_uint8(self, image: Image.Image) -> np.ndarray:
        """Resize, crop and convert one image of any mode to uint8 [3, S, S].

        Raises:
            ValueError: the image is so narrow that scaling its shorter side up would not fit in memory.
        """
        method = InterpolationMode(self.interpolation)
        if self.resize_mode == "squash":
            image = F.resize(image, [self.size, self.size], method)
        else:
            short, long = sorted(image.size)
            if self.size * (self.size * long // max(short, 1)) > (Image.MAX_IMAGE_PIXELS or float("inf")):
                raise ValueError(f"{image.width} x {image.height} pixels is too narrow to scale to {self.size}")
            image = F.center_crop(F.resize(image, [self.size], method), [self.size, self.size])
        # Last, as in open_clip: for palette and transparent images the order matters.
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] to float32 [n, 3, H, W], on the same device."""
        return F.normalize(pixels.to(torch.float32, copy=True).div_(255), list(self.mean), list(self.std), inplace=True)

    def key(self) -> str:
        """The parameters of `to_uint8` as text: equal keys give equal bytes for equal images."""
        return f"size={self.size} resize={self.resize_mode} interpolation={self.interpolation}"
