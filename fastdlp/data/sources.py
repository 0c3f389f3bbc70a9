"""Labelled images of one data set behind one interface: names, labels, sample ids and `open(i)`.

Lists and labels are read at once, images when they are opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastdlp.errors import FastdlpError


@dataclass(frozen=True, eq=False)
class Samples:
    """The labeled samples of a data set.

    Attributes:
        name: the data set's name, the same on every machine.
        class_names: one name per class, as in a prompt.
        template: the prompt, with one {} for the class name.
        labels: int64 [n], indices into class_names.
        ids: n distinct sample names, the same on every machine.
    """

    name: str
    class_names: list[str]
    template: str
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class ImageSource(Samples):
    """Interface of every data set; subclasses define where a sample's bytes are."""

    def open(self, index: int) -> Image.Image:
        """Decode one sample fully. Raises whatever the decoder raises on a broken one."""
        raise NotImplementedError

    def digest(self, index: int) -> bytes:
        """SHA-256 of one sample's bytes."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the ids, the labels and every sample's bytes: equal only if the data are."""
        total = hashlib.sha256()
        with ThreadPoolExecutor(thread_count()) as pool:
            for name, label, digest in zip(self.ids, self.labels, pool.map(self.digest, range(len(self)))):
                encoded = name.encode(errors="surrogateescape")
                total.update(f"{len(encoded)} {int(label)} ".encode() + encoded + digest)
        return total.hexdigest()


@dataclass(frozen=True, eq=False)
class ArraySource(ImageSource):
    """Samples that lie in one array: uint8 [n, height, width] (gray) or [n, height, width, 3] (RGB)."""

    images: np.ndarray

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def digest(self, index: int) -> bytes:
        return hashlib.sha256(self.images[index].tobytes()).digest()


@dataclass(frozen=True, eq=False)
class FileSource(ImageSource):
    """Samples that are files."""

    paths: Sequence[Path]

    def open(self, index: int) -> Image.Image:
        path = self.paths[index]
        extensions, formats = _readable()
        if path.suffix.lower() not in extensions:
            raise ValueError("not an image file")
        with Image.open(path, formats=formats) as image:
            image.load()
        return _to_8_bit(image)

    def digest(self, index: int) -> bytes:
        try:
            with open(self.paths[index], "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return b"unreadable"  # load_pixels reports the file; the fingerprint changes once it is readable


DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT_TEMPLATE = "a photo of the digit {}"


def thread_count() -> int:
    """Number of threads for decoding: the processors that this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


def prompt_name(name: str) -> str:
    """A class name as in a prompt: single spaces in place of underscores."""
    return " ".join(name.replace("_", " ").split())


def digits() -> ArraySource:
    """scikit-learn's 1,797 gray 8x8 digits, which are part of the library."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return ArraySource(
        name="digits",
        class_names=DIGIT_NAMES,
        template=DIGIT_TEMPLATE,
        labels=bunch.target.astype(np.int64),
        ids=[f"digits/{i:05d}" for i in range(len(bunch.target))],
        images=np.round(bunch.images * (255 / 16)).astype(np.uint8),
    )


def image_folder(root: Path) -> ImageSource:
    """One class per folder in `root`. Files that are no images stay in the list; `load_pixels` reports them."""
    if not root.is_dir():
        raise FastdlpError(f"{root} is not a folder: folder:PATH needs a folder with one folder of images per class")
    class_names: list[str] = []
    labels: list[int] = []
    paths: list[Path] = []
    try:
        folders = [entry for entry in _visible(root) if entry.is_dir()]
        if not folders:
            raise FastdlpError(f"{root} holds no class folders: put the images of each class into a folder of its own")
        for folder in folders:
            files = _visible(folder)
            if inner := [entry.name for entry in files if entry.is_dir()]:
                raise FastdlpError(
                    f"the class folder {folder} holds the folder {inner[0]!r}: pass the folder whose "
                    "folders are the classes, with nothing but images in each"
                )
            if not any(file.suffix.lower() in _readable()[0] for file in files):
                raise FastdlpError(f"the class folder {folder} holds no images: add some or remove it")
            name = prompt_name(folder.name.replace("-", " "))
            if not name or name in class_names:
                why = f" like that of {folders[class_names.index(name)].name!r}" if name else ", which is empty"
                raise FastdlpError(f"the folder name {folder.name!r} reads {name!r} in a prompt{why}: rename it")
            labels += [len(class_names)] * len(files)
            paths += files
            class_names.append(name)
    except OSError as error:
        raise FastdlpError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
    return FileSource(
        name=f"folder:{root.resolve().name}",
        class_names=class_names,
        template="a photo of a {}.",
        labels=np.array(labels, np.int64),
        ids=[f"{path.parent.name}/{path.name}" for path in paths],
        paths=paths,
    )


def _visible(folder: Path) -> list[Path]:
    """The files and folders in `folder` that are not hidden, by name."""
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda p: p.name)


@cache
def _readable() -> tuple[frozenset[str], list[str]]:
    """The extensions and the formats that Pillow decodes itself.

    EPS is excluded, by extension and by content: Pillow calls Ghostscript, which executes it.
    """
    known = Image.registered_extensions()
    extensions = frozenset(ext for ext, name in known.items() if name not in ("EPS", "PDF", "PALM"))
    return extensions, sorted(set(Image.OPEN) - {"EPS"})


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray (0..65535) to mode L; Pillow's own conversion clips at 255."""
    if image.mode == "F":
        raise ValueError("a floating-point image has no fixed white: save it with 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8))
