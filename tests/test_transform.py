"""The cut transform is bitwise open_clip's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdlp.data.transform import Transform
from fastdlp.errors import FastdlpError
from tests.pairs import cases

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _image(kind: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if kind == "1 wide":
        return Image.fromarray(rng.integers(0, 256, (70, 1, 3), dtype=np.uint8))
    if kind == "1 high":
        return Image.fromarray(rng.integers(0, 256, (1, 33, 3), dtype=np.uint8))
    if kind == "16 bit":
        return Image.fromarray(rng.integers(0, 2**16, (45, 61), dtype=np.uint16))
    if kind == "LA":
        return Image.fromarray(rng.integers(0, 256, (45, 61, 2), dtype=np.uint8), "LA")
    image = Image.fromarray(rng.integers(0, 256, (45, 61, 3), dtype=np.uint8))
    return image if kind == "RGB" else image.convert(kind)


@cases(
    kind=["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "1 wide", "1 high", "16 bit"],
    resize_mode=["shortest", "squash"],
    interpolation=["bicubic", "bilinear"],
    size=[32, 75],
)
def test_bitwise_equal_to_open_clip(kind: str, resize_mode: str, interpolation: str, size: int) -> None:
    from open_clip.transform import image_transform

    reference = image_transform(
        size, is_train=False, mean=MEAN, std=STD, resize_mode=resize_mode, interpolation=interpolation
    )
    transform = Transform(size, resize_mode, interpolation, MEAN, STD)  # type: ignore[arg-type]
    image = _image(kind)
    pixels = transform.to_uint8(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    batch = transform.normalize(torch.from_numpy(np.stack([pixels, pixels[:, ::-1]])))
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], reference(image))
    assert torch.equal(batch[1], reference(image).flip(1))


def test_normalize_leaves_its_input_alone() -> None:
    transform = Transform(4, "squash", "bicubic", MEAN, STD)
    for dtype in (torch.uint8, torch.float32):
        pixels = torch.full((1, 3, 4, 4), 200, dtype=dtype)
        transform.normalize(pixels)
        assert torch.equal(pixels, torch.full_like(pixels, 200))


def test_a_sliver_is_refused_before_it_fills_the_memory() -> None:
    sliver = Image.new("RGB", (1, 60_000))
    with pytest.raises(ValueError, match="1 x 60000 pixels is too narrow"):
        Transform(224, "shortest", "bicubic", MEAN, STD).to_uint8(sliver)
    assert Transform(224, "squash", "bicubic", MEAN, STD).to_uint8(sliver).shape == (3, 224, 224)


def test_the_key_depends_on_what_changes_the_bytes() -> None:
    key = Transform(32, "squash", "bicubic", MEAN, STD).key()
    assert key == Transform(32, "squash", "bicubic", STD, MEAN).key()  # mean and std come after the cache
    others = [(33, "squash", "bicubic"), (32, "shortest", "bicubic"), (32, "squash", "bilinear")]
    assert len({key, *(Transform(*other, MEAN, STD).key() for other in others)}) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        (0, "squash", "bicubic", MEAN, STD),
        (32, "longest", "bicubic", MEAN, STD),
        (32, "squash", "random", MEAN, STD),
        (32, "squash", "bicubic", MEAN, (1.0, 0.0, 1.0)),
        (32, "squash", "bicubic", (0.5,), STD),
    ],
)
def test_bad_settings_are_refused(arguments: tuple) -> None:
    with pytest.raises(FastdlpError):
        Transform(*arguments)
