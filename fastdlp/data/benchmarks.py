"""The papers' benchmark data sets: FEDDLP's four, and the twelve that FLoRA adds.

`load_benchmark` finds a set, or downloads it, and turns whatever is wrong with its files into one line.
"""

from __future__ import annotations

import csv
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from scipy.io.matlab import MatReadError

from fastdlp.data import array_datasets, image_datasets
from fastdlp.data.array_datasets import Arrays
from fastdlp.data.download import download_folder, fetch_archive, unpack
from fastdlp.data.image_datasets import Listing
from fastdlp.data.sources import ImageSource
from fastdlp.errors import FastdlpError
from fastdlp.files import cache_root


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    Attributes:
        read: lists its samples, given data_dir.
        folder: the folder that it is in data_dir.
        template: its prompt, OpenAI's first for CLIP where there is one.
        fetch: downloads it to a folder given; None where it cannot be had without a person.
        by_hand: how a person gets it, where `fetch` is None.
        pickled: a folder with the same samples as Python pickles, which are not read.
    """

    read: Callable[[Path], Listing | Arrays]
    folder: str
    template: str
    fetch: Callable[[Path], None] | None
    by_hand: str = ""
    pickled: str = ""


def _torchvision(name: str) -> Callable[[Path], None]:
    """Downloads as torchvision's class `name` does, all splits."""

    def fetch(into: Path) -> None:
        from torchvision import datasets

        getattr(datasets, name)(into, download=True)

    return fetch


def _archive(url: str, md5: str, subfolder: str = "") -> Callable[[Path], None]:
    """Downloads one archive and unpacks it into a subfolder."""
    return lambda into: fetch_archive(url, md5, into / subfolder)


def _fetch_caltech101(into: Path) -> None:
    """A zip that holds a tar."""
    url = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
    fetch_archive(url, "3138e1922a9193bfa496528edbbc45d0", into)
    unpack(into / "caltech-101" / "101_ObjectCategories.tar.gz", into / "caltech101")


# Zips are fetched by our own function, because torchvision's lets zipfile rename what points outside.
BENCHMARKS = {
    "pets": Benchmark(
        image_datasets.pets, "oxford-iiit-pet", "a photo of a {}, a type of pet.", _torchvision("OxfordIIITPet")
    ),
    "flowers": Benchmark(
        image_datasets.flowers, "flowers-102", "a photo of a {}, a type of flower.", _torchvision("Flowers102")
    ),
    "aircraft": Benchmark(
        image_datasets.aircraft,
        "fgvc-aircraft-2013b",
        "a photo of a {}, a type of aircraft.",
        _torchvision("FGVCAircraft"),
    ),
    "dtd": Benchmark(image_datasets.dtd, "dtd", "a photo of a {} texture.", _torchvision("DTD")),
    "cifar10": Benchmark(
        array_datasets.cifar10,
        "cifar-10-batches-bin",
        "a photo of a {}.",
        _archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        pickled="cifar-10-batches-py",
    ),
    "cifar100": Benchmark(
        array_datasets.cifar100,
        "cifar-100-binary",
        "a photo of a {}.",
        _archive("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        pickled="cifar-100-python",
    ),
    "tiny-imagenet": Benchmark(
        image_datasets.tiny_imagenet,
        "tiny-imagenet-200",
        "a photo of a {}.",
        _archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    ),
    "caltech101": Benchmark(image_datasets.caltech101, "caltech101", "a photo of a {}.", _fetch_caltech101),
    "cars": Benchmark(
        image_datasets.cars,
        "stanford_cars",
        "a photo of a {}.",
        fetch=None,
        by_hand="its host is gone; https://github.com/pytorch/vision/issues/7545 says where to get cars_train, "
        "cars_test, devkit and cars_test_annos_withlabels.mat",
    ),
    "country211": Benchmark(
        image_datasets.country211, "country211", "a photo i took in {}.", _torchvision("Country211")
    ),
    "eurosat": Benchmark(
        image_datasets.eurosat,
        "eurosat",
        "a centered satellite photo of {}.",
        _archive(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
            "eurosat",
        ),
    ),
    "fer2013": Benchmark(
        array_datasets.fer2013,
        "fer2013",
        "a photo of a {} looking face.",
        fetch=None,
        by_hand="get fer2013.csv or icml_face_data.csv, with an account, from "
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
    ),
    "fashionmnist": Benchmark(
        array_datasets.fashionmnist,
        "FashionMNIST",
        "a photo of a {}, a type of clothing.",
        _torchvision("FashionMNIST"),
    ),
    "food101": Benchmark(image_datasets.food101, "food-101", "a photo of {}, a type of food.", _torchvision("Food101")),
    "sst2": Benchmark(image_datasets.sst2, "rendered-sst2", "a {} review of a movie.", _torchvision("RenderedSST2")),
    "sun397": Benchmark(image_datasets.sun397, "SUN397", "a photo of a {}.", _torchvision("SUN397")),
}

# What missing, cut off or altered files make torchvision, numpy, scipy and the archive readers raise. The last
# row is what code that trusts a file's form runs into.
_FAILURES = (
    *(OSError, RuntimeError, ValueError, LookupError, EOFError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error, MatReadError, HTTPException),
    *(TypeError, AttributeError, UnboundLocalError, AssertionError),
)


def load_benchmark(name: str, data_dir: Path | None, download: bool) -> ImageSource:
    """Open one of BENCHMARKS in `data_dir`, or in `datasets` of the cache folder; download it where asked.

    Sample ids are the paths below the set's folder of images, or the part and the place in it where the samples lie
    in arrays; samples are sorted by id.

    Raises:
        FastdlpError: the set is missing or damaged, or the download fails.
    """
    benchmark = BENCHMARKS[name]
    root = data_dir if data_dir is not None else cache_root() / "datasets"
    folder = root / benchmark.folder
    if not folder.is_dir():
        if not download or benchmark.fetch is None:
            raise FastdlpError(_missing(name, benchmark, root))
        try:
            download_folder(benchmark.fetch, root, benchmark.folder)
        except _FAILURES as error:
            raise FastdlpError(
                f"cannot download the data set {name} to {root}: {_cause(error)}; try again, or place it there "
                "by hand and pass --data-dir"
            ) from error
    try:
        source = benchmark.read(root).source(name, benchmark.template)
        _check(source)
    except _FAILURES as error:
        remedy = "remove that folder and pass --download, or complete it" if benchmark.fetch else benchmark.by_hand
        raise FastdlpError(
            f"the data set {name} in {folder} is incomplete or damaged ({_cause(error)}): {remedy}"
        ) from error
    return source


def _missing(name: str, benchmark: Benchmark, root: Path) -> str:
    """One line on what to do about a set that is not there and is not to be downloaded."""
    if benchmark.fetch is None:
        return (
            f"{root} does not hold the data set {name} (the folder {benchmark.folder}), which cannot be downloaded by "
            f"a program: {benchmark.by_hand}; place them in that folder and pass --data-dir with the folder around it"
        )
    if benchmark.pickled and (root / benchmark.pickled).is_dir():
        return (
            f"{root} holds the data set {name} only as Python pickles ({benchmark.pickled}), which are not read "
            f"because a pickle can run any program: pass --download to fetch the binary version ({benchmark.folder})"
        )
    return (
        f"{root} does not hold the data set {name} (the folder {benchmark.folder}): pass --data-dir "
        "with the folder where it lies, or --download to fetch it there"
    )


def _check(source: ImageSource) -> None:
    """Raise ValueError unless the labels, the ids and the class names are what ImageSource says."""
    if not len(source):
        raise ValueError("it lists no samples")
    if not 0 <= source.labels.min() <= source.labels.max() < len(source.class_names):
        raise ValueError(f"it has labels beyond its {len(source.class_names)} classes")
    if not all(source.class_names):
        raise ValueError("it has a class without a name")
    for what, values in (("class", source.class_names), ("sample", source.ids)):
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise ValueError(f"it lists the {what} {value!r} {count} times")


def _cause(error: BaseException) -> str:
    """One line on what went wrong, in the words of whoever noticed."""
    words = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    if isinstance(error, KeyError):
        words = f"nothing is known of {words}"
    return words.replace("You can use download=True to download it", "").strip().rstrip(".")
