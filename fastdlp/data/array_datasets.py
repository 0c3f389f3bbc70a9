"""The benchmarks whose samples lie in a few binary or text files, all labeled splits pooled: a function per data set.

None of them unpickles anything. torchvision's CIFAR loaders do, and its FashionMNIST loader calls torch.load on files
of an old version; therefore the authors' own binary files are read here. A function raises whatever a missing or
altered file raises. `fastdlp.data.registry` fills in name and template.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from fastdlp.data.sources import ArraySource, prompt_name

Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]


def cifar10(root: Path) -> ArraySource:
    """The binary version: records of one byte of label and 3,072 of pixels."""
    files = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    return _cifar(root / "cifar-10-batches-bin", files, "batches.meta.txt", label_bytes=1)


def cifar100(root: Path) -> ArraySource:
    """The binary version: records of a byte of coarse label, one of fine label and 3,072 of pixels."""
    return _cifar(root / "cifar-100-binary", ["train.bin", "test.bin"], "fine_label_names.txt", label_bytes=2)


def fashionmnist(root: Path) -> ArraySource:
    raw = root / "FashionMNIST" / "raw"
    parts = {}
    for part, prefix in (("test", "t10k"), ("train", "train")):
        images = read_image_file(str(raw / f"{prefix}-images-idx3-ubyte"))
        parts[part] = (images.numpy(), read_label_file(str(raw / f"{prefix}-labels-idx1-ubyte")).numpy())
    return _source(FashionMNIST.classes, parts)


def fer2013(root: Path) -> ArraySource:
    """fer2013.csv or icml_face_data.csv, which hold the same: emotion, usage and 48x48 gray pixels a line.

    torchvision reads them too, but converts each of the 83 million pixels to a Python number.
    """
    folder = root / "fer2013"
    table = next((path for name in ("fer2013.csv", "icml_face_data.csv") if (path := folder / name).is_file()), None)
    if table is None:
        raise FileNotFoundError("it holds neither fer2013.csv nor icml_face_data.csv; test.csv has no labels")
    images: dict[str, list[np.ndarray]] = {"Training": [], "PublicTest": [], "PrivateTest": []}
    labels: dict[str, list[int]] = {usage: [] for usage in images}
    with open(table, newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        for row in reader:
            pixels = np.fromstring(row["pixels"], np.int64, sep=" ")
            if len(pixels) != 48 * 48 or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError(f"line {reader.line_num} of {table.name} is no image of 48x48 bytes")
            images[row["Usage"]].append(pixels.astype(np.uint8).reshape(48, 48))
            labels[row["Usage"]].append(int(row["emotion"]))
    if missing := [usage for usage in images if not images[usage]]:
        raise ValueError(f"{table.name} has no line of {missing[0]}")
    parts = {usage: (np.array(images[usage]), np.array(labels[usage])) for usage in images}
    return _source(["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"], parts)


def _source(class_names: Sequence[str], arrays: Arrays) -> ArraySource:
    """The samples sorted by id, which is the part and the index in it.

    Args:
        class_names: as in a prompt, except for underscores.
        arrays: part → images, uint8 [n, height, width] or [n, height, width, 3], and labels, int [n].

    Raises:
        ValueError: a part with more or fewer labels than images.
    """
    parts = sorted(arrays.items())
    for part, (images, labels) in parts:
        if len(images) != len(labels):
            raise ValueError(f"{part} has {len(images)} images and {len(labels)} labels")
    return ArraySource(
        name="",
        class_names=[prompt_name(name) for name in class_names],
        template="",
        labels=np.concatenate([labels for _, (_, labels) in parts]).astype(np.int64),
        ids=[f"{part}/{index:05d}" for part, (_, labels) in parts for index in range(len(labels))],
        images=np.concatenate([images for _, (images, _) in parts]),
    )


def _cifar(folder: Path, files: list[str], names: str, label_bytes: int) -> ArraySource:
    """Records of `label_bytes` labels, the last of which is the class, and three planes of 32x32 pixels."""
    width = label_bytes + 3 * 32 * 32
    parts = {}
    for name in files:
        content = np.fromfile(folder / name, np.uint8)
        if not len(content) or len(content) % width:
            raise ValueError(f"{name} has {len(content)} bytes, which is no number of records of {width}")
        records = content.reshape(-1, width)
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[name.removesuffix(".bin")] = (images, records[:, label_bytes - 1])
    return _source((folder / names).read_text().split(), parts)
