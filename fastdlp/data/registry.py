"""The data sets by name: scikit-learn's digits, the papers' benchmarks (FEDDLP's four, FLoRA's twelve) and folders.

Readers are imported when a data set is opened, so that an invalid name is reported before torchvision loads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastdlp.data.download import download_folder, fetch_archive, unpack
from fastdlp.errors import FastdlpError
from fastdlp.files import cache_root

if TYPE_CHECKING:
    from fastdlp.data.sources import ImageSource

FOLDER = "folder:"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark data set. The function of its name in `image_datasets` or `array_datasets` lists its samples.

    Attributes:
        folder: the data set's folder in data_dir.
        fetch: downloads the data set to a given folder; None if it cannot be downloaded without an account.
        template: the prompt, OpenAI's first one for CLIP where there is one.
        instructions: how to get it, where `fetch` is None.
        pickled: a folder with the same samples as Python pickles, which are not read.
    """

    folder: str
    fetch: Callable[[Path], None] | None
    template: str = "a photo of a {}."
    instructions: str = ""
    pickled: str = ""


def _torchvision(name: str) -> Callable[[Path], None]:
    """A function that downloads all splits as torchvision's class `name` does."""

    def fetch(into: Path) -> None:
        from torchvision import datasets

        getattr(datasets, name)(into, download=True)

    return fetch


def _archive(url: str, md5: str, subfolder: str = "") -> Callable[[Path], None]:
    """A function that downloads one archive and unpacks it into a subfolder."""
    return lambda into: fetch_archive(url, md5, into / subfolder)


def _fetch_caltech101(into: Path) -> None:
    """Download a zip that holds a tar."""
    url = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
    fetch_archive(url, "3138e1922a9193bfa496528edbbc45d0", into)
    unpack(into / "caltech-101" / "101_ObjectCategories.tar.gz", into / "caltech101")


# Zips are unpacked by `download.unpack`: torchvision's function lets zipfile rename members that point outside.
BENCHMARKS = {
    "pets": Benchmark("oxford-iiit-pet", _torchvision("OxfordIIITPet"), "a photo of a {}, a type of pet."),
    "flowers": Benchmark("flowers-102", _torchvision("Flowers102"), "a photo of a {}, a type of flower."),
    "aircraft": Benchmark("fgvc-aircraft-2013b", _torchvision("FGVCAircraft"), "a photo of a {}, a type of aircraft."),
    "dtd": Benchmark("dtd", _torchvision("DTD"), "a photo of a {} texture."),
    "cifar10": Benchmark(
        "cifar-10-batches-bin",
        _archive("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        pickled="cifar-10-batches-py",
    ),
    "cifar100": Benchmark(
        "cifar-100-binary",
        _archive("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        pickled="cifar-100-python",
    ),
    "tiny-imagenet": Benchmark(
        "tiny-imagenet-200",
        _archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    ),
    "caltech101": Benchmark("caltech101", _fetch_caltech101),
    "cars": Benchmark(
        "stanford_cars",
        fetch=None,
        instructions="its host is offline; https://github.com/pytorch/vision/issues/7545 says where to get cars_train, "
        "cars_test, devkit and cars_test_annos_withlabels.mat",
    ),
    "country211": Benchmark("country211", _torchvision("Country211"), "a photo i took in {}."),
    "eurosat": Benchmark(
        "eurosat",
        _archive(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
            "eurosat",
        ),
        "a centered satellite photo of {}.",
    ),
    "fer2013": Benchmark(
        "fer2013",
        fetch=None,
        template="a photo of a {} looking face.",
        instructions="get fer2013.csv or icml_face_data.csv, with an account, from "
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
    ),
    "fashionmnist": Benchmark("FashionMNIST", _torchvision("FashionMNIST"), "a photo of a {}, a type of clothing."),
    "food101": Benchmark("food-101", _torchvision("Food101"), "a photo of {}, a type of food."),
    "sst2": Benchmark("rendered-sst2", _torchvision("RenderedSST2"), "a {} review of a movie."),
    "sun397": Benchmark("SUN397", _torchvision("SUN397")),
}

DATASETS = ("digits", *BENCHMARKS)
"""Every name that `load_source` accepts, besides "folder:PATH"."""


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
        data_dir: folder that holds the data set or that it is downloaded to; `datasets` in the cache folder if None.
            Not used by digits and folder:PATH.
        download: download the data set if data_dir does not hold it.

    Returns:
        The samples, sorted by id. Ids of a benchmark are the paths below its folder of images, or the name of the part
        and the index in it where the samples lie in arrays.

    Raises:
        FastdlpError: unknown name, data set missing or damaged, failed download, unusable folder.
    """
    check_name(name)
    from fastdlp.data import sources

    if name.startswith(FOLDER):
        return sources.image_folder(Path(name.removeprefix(FOLDER)).expanduser())
    if name == "digits":
        return sources.digits()
    return _load_benchmark(name, Path(data_dir).expanduser() if data_dir is not None else None, download)


def _load_benchmark(name: str, data_dir: Path | None, download: bool) -> ImageSource:
    """Open one of BENCHMARKS, see `load_source`."""
    from fastdlp.data import array_datasets, image_datasets

    benchmark = BENCHMARKS[name]
    root = data_dir if data_dir is not None else cache_root() / "datasets"
    folder = root / benchmark.folder
    if not folder.is_dir():
        if not download or benchmark.fetch is None:
            raise FastdlpError(_missing(name, benchmark, root))
        try:
            download_folder(benchmark.fetch, root, benchmark.folder)
        except Exception as error:  # the network and the archive readers raise unrelated types
            raise FastdlpError(
                f"cannot download the data set {name} to {root}: {_cause(error)}; try again, or place it there "
                "manually and pass --data-dir"
            ) from error
    try:
        function = name.replace("-", "_")
        read = getattr(image_datasets, function, None) or getattr(array_datasets, function)
        source = replace(read(root), name=name, template=benchmark.template)
        _check(source)
    except Exception as error:  # torchvision, numpy and scipy raise unrelated types for missing or altered files
        remedy = "remove that folder and pass --download, or complete it" if benchmark.fetch else benchmark.instructions
        raise FastdlpError(
            f"the data set {name} in {folder} is incomplete or damaged ({_cause(error)}): {remedy}"
        ) from error
    return source


def _missing(name: str, benchmark: Benchmark, root: Path) -> str:
    """The message for a data set that is missing and not downloaded."""
    if benchmark.fetch is None:
        return (
            f"{root} does not hold the data set {name} (the folder {benchmark.folder}), which cannot be downloaded by "
            f"a program: {benchmark.instructions}; place them in that folder and pass --data-dir with its parent folder"
        )
    if benchmark.pickled and (root / benchmark.pickled).is_dir():
        return (
            f"{root} holds the data set {name} only as Python pickles ({benchmark.pickled}), which are not read "
            f"because a pickle can run any program: pass --download to fetch the binary version ({benchmark.folder})"
        )
    return (
        f"{root} does not hold the data set {name} (the folder {benchmark.folder}): pass --data-dir "
        "with the folder that does, or --download to fetch it there"
    )


def _check(source: ImageSource) -> None:
    """Raise ValueError unless labels, ids and class names are as `ImageSource` documents them."""
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
    """The message of an error in one line."""
    text = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"nothing is known of {text}"
    return text.replace("You can use download=True to download it", "").strip().rstrip(".")
