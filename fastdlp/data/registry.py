"""The data sets by name. Loaders are imported when a set is opened: a bad name fails before anything heavy loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastdlp.errors import FastdlpError

if TYPE_CHECKING:
    from fastdlp.data.sources import ImageSource

DATASETS = (
    "digits",
    "pets",
    "flowers",
    "aircraft",
    "dtd",
    "cifar10",
    "cifar100",
    "tiny-imagenet",
    "caltech101",
    "cars",
    "country211",
    "eurosat",
    "fer2013",
    "fashionmnist",
    "food101",
    "sst2",
    "sun397",
)
"""Every name `load_source` knows, besides "folder:PATH"."""

FOLDER = "folder:"


def check_name(name: str) -> None:
    """Raise FastdlpError, listing the known names, unless `name` is one of them or "folder:PATH"."""
    if name == FOLDER:
        raise FastdlpError("the data set folder: needs a path: folder:PATH, with one folder per class in PATH")
    if name not in DATASETS and not name.startswith(FOLDER):
        raise FastdlpError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)} or folder:PATH")


def load_source(name: str, data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> ImageSource:
    """Open a data set by name.

    Args:
        name: one of DATASETS, or "folder:PATH" with one folder of images per class in PATH.
        data_dir: where the data set lies or is downloaded to; `datasets` in the cache folder if None. Not
            used by digits and folder:PATH.
        download: fetch the data set if data_dir does not hold it.

    Raises:
        FastdlpError: unknown name, data set missing or damaged, failed download, unusable folder.
    """
    check_name(name)
    from fastdlp.data import sources

    if name.startswith(FOLDER):
        return sources.image_folder(Path(name.removeprefix(FOLDER)).expanduser())
    if name == "digits":
        return sources.digits()
    from fastdlp.data.benchmarks import load_benchmark

    return load_benchmark(name, Path(data_dir).expanduser() if data_dir is not None else None, download)
