"""The papers' benchmark data sets, read through torchvision, all splits pooled.

One small function per set is all that touches torchvision's own fields; it lists files, names and labels.
"""

from __future__ import annotations

import os
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdlp.data.sources import FileSource
from fastdlp.errors import FastdlpError
from fastdlp.files import cache_root


@dataclass(frozen=True)
class Listing:
    """The pooled samples of one set: each file with its class, and the classes in the set's own order."""

    root: Path
    classes: list[str]
    files: dict[Path, str]


def _pets(root: Path, download: bool) -> Listing:
    from torchvision.datasets import OxfordIIITPet

    splits = [OxfordIIITPet(root, s, target_types="category", download=download) for s in ("trainval", "test")]
    labels = {path: label for split in splits for path, label in zip(split._images, split._labels)}
    # A breed's name stands in the file names alone: american_bulldog_100.jpg.
    breeds = {label: path.stem.rpartition("_")[0] for path, label in labels.items()}
    files = {path: breeds[label] for path, label in labels.items()}
    return Listing(splits[0]._images_folder, [breeds[label] for label in sorted(breeds)], files)


def _flowers(root: Path, download: bool) -> Listing:
    from torchvision.datasets import Flowers102

    splits = [Flowers102(root, split, download=download) for split in ("train", "val", "test")]
    names = list(Flowers102.classes)
    files = {path: names[label] for split in splits for path, label in zip(split._image_files, split._labels)}
    return Listing(splits[0]._images_folder, names, files)


def _aircraft(root: Path, download: bool) -> Listing:
    from torchvision.datasets import FGVCAircraft

    splits = [FGVCAircraft(root, s, annotation_level="variant", download=download) for s in ("trainval", "test")]
    names = splits[0].classes
    files = {Path(path): names[label] for split in splits for path, label in zip(split._image_files, split._labels)}
    return Listing(Path(splits[0]._data_path, "data", "images"), names, files)


def _dtd(root: Path, download: bool) -> Listing:
    from torchvision.datasets import DTD

    splits = [DTD(root, split, partition=1, download=download) for split in ("train", "val", "test")]
    files = {path: path.parent.name for split in splits for path in split._image_files}
    return Listing(splits[0]._images_folder, sorted(set(files.values())), files)


@dataclass(frozen=True)
class Benchmark:
    """How to list a set, the folder it makes in data_dir, and its prompt."""

    list_files: Callable[[Path, bool], Listing]
    folder: str
    template: str


BENCHMARKS = {
    "pets": Benchmark(_pets, "oxford-iiit-pet", "a photo of a {}, a type of pet."),
    "flowers": Benchmark(_flowers, "flowers-102", "a photo of a {}, a type of flower."),
    "aircraft": Benchmark(_aircraft, "fgvc-aircraft-2013b", "a photo of a {}, a type of aircraft."),
    "dtd": Benchmark(_dtd, "dtd", "a photo of a {} texture."),
}

# What torchvision and the archive readers raise on missing, cut off or altered files.
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, IndexError, EOFError, tarfile.TarError, zlib.error)
_TIMEOUT = 60.0  # seconds without an answer before a download gives up


def load_benchmark(name: str, data_dir: Path | None, download: bool) -> FileSource:
    """Open one of BENCHMARKS in `data_dir`, or in `datasets` of the cache folder; download it where asked.

    Sample ids are the paths below the set's folder of images; samples are sorted by id.

    Raises:
        FastdlpError: the set is missing or damaged, or the download fails.
    """
    benchmark = BENCHMARKS[name]
    root = data_dir if data_dir is not None else cache_root() / "datasets"
    folder = root / benchmark.folder
    if not folder.is_dir():
        if not download:
            raise FastdlpError(
                f"{root} does not hold the data set {name} (the folder {benchmark.folder}): pass --data-dir "
                "with the folder where it lies, or --download to fetch it there"
            )
        _download(name, benchmark, root)
    try:
        listing = benchmark.list_files(root, False)
    except _FAILURES as error:
        raise FastdlpError(
            f"the data set {name} in {folder} is incomplete or damaged ({_cause(error)}): remove that folder "
            "and pass --download, or complete it"
        ) from error
    files = sorted((path.relative_to(listing.root).as_posix(), path) for path in listing.files)
    return FileSource(
        name=name,
        class_names=[clean_name(label) for label in listing.classes],
        template=benchmark.template,
        labels=np.array([listing.classes.index(listing.files[path]) for _, path in files], np.int64),
        ids=[sample for sample, _ in files],
        paths=[path for _, path in files],
    )


def clean_name(name: str) -> str:
    """A class name as words for a prompt: spaces for underscores, no "?" (as in "pink-yellow dahlia?")."""
    return " ".join(name.replace("_", " ").replace("?", " ").split())


def _download(name: str, benchmark: Benchmark, root: Path) -> None:
    """Fetch and unpack a set aside, then move it into place whole.

    torchvision takes any folder of the right name for a complete one, also what a broken download left.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as aside, _timeout():
            benchmark.list_files(Path(aside), True)
            fetched = Path(aside, benchmark.folder)
            for archive in [*fetched.glob("*.tar.gz"), *fetched.glob("*.tgz")]:
                archive.unlink()  # unpacked; it would only double the room taken
            os.replace(fetched, root / benchmark.folder)
    except _FAILURES as error:
        raise FastdlpError(
            f"cannot download the data set {name} to {root}: {_cause(error)}; try again, or place it there "
            "by hand and pass --data-dir"
        ) from error


@contextmanager
def _timeout() -> Iterator[None]:
    """urllib waits for ever by default, and torchvision passes no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _cause(error: BaseException) -> str:
    """One line on what went wrong, in the words of whoever noticed."""
    words = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    return words.replace("You can use download=True to download it", "").strip().rstrip(".")
