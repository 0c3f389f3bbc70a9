"""The benchmarks whose samples are image files, all labeled splits pooled: one function per data set lists them.

Only these functions access torchvision's private fields. Class names are those of OpenAI's zero-shot evaluation of CLIP
(data/prompts.md in its repository) where it covers the data set. A function raises whatever a missing or altered file
raises. `fastdlp.data.registry` fills in name and template.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from fastdlp.data.sources import FileSource, prompt_name


def pets(root: Path) -> FileSource:
    splits = [datasets.OxfordIIITPet(root, split, target_types="category") for split in ("trainval", "test")]
    samples = [sample for split in splits for sample in zip(split._images, split._labels)]
    # Only the file names hold the breed's name: american_bulldog_100.jpg.
    breeds = {label: path.stem.rpartition("_")[0] for path, label in samples}
    order = {label: index for index, label in enumerate(sorted(breeds))}
    names = [breeds[label] for label in order]
    return _source(splits[0]._images_folder, names, [(path, order[label]) for path, label in samples])


def flowers(root: Path) -> FileSource:
    openai = {"globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"}
    splits = [datasets.Flowers102(root, split) for split in ("train", "val", "test")]
    names = [openai.get(name, name) for name in datasets.Flowers102.classes]
    return _source(splits[0]._images_folder, names, _pooled(splits))


def aircraft(root: Path) -> FileSource:
    splits = [datasets.FGVCAircraft(root, split, annotation_level="variant") for split in ("trainval", "test")]
    return _source(Path(splits[0]._data_path, "data", "images"), splits[0].classes, _pooled(splits))


def dtd(root: Path) -> FileSource:
    return _by_folder([datasets.DTD(root, split, partition=1) for split in ("train", "val", "test")])


def food101(root: Path) -> FileSource:
    return _by_folder([datasets.Food101(root, split) for split in ("train", "test")])


def cars(root: Path) -> FileSource:
    splits = [datasets.StanfordCars(root, split) for split in ("train", "test")]
    return _source(splits[0]._base_folder, splits[0].classes, [sample for split in splits for sample in split._samples])


def sun397(root: Path) -> FileSource:
    whole = datasets.SUN397(root)
    names = [name.replace("/", " ") for name in whole.classes]  # apartment_building/outdoor
    return _source(whole._data_dir, names, _pooled([whole]))


def caltech101(root: Path) -> FileSource:
    """All 101 categories, with Faces and Faces_easy apart as in OpenAI's list, without BACKGROUND_Google."""
    folder = root / "caltech101" / "101_ObjectCategories"
    return _class_folders(folder, [""], _class_names("caltech101"), ignored=["BACKGROUND_Google"])


def country211(root: Path) -> FileSource:
    return _class_folders(root / "country211", ["train", "valid", "test"], _class_names("country211"))


def eurosat(root: Path) -> FileSource:
    return _class_folders(root / "eurosat" / "2750", [""], _class_names("eurosat"))


def sst2(root: Path) -> FileSource:
    names = {"negative": "negative", "positive": "positive"}
    return _class_folders(root / "rendered-sst2", ["train", "valid", "test"], names)


def tiny_imagenet(root: Path) -> FileSource:
    """Training and validation images; the test images have no labels.

    A class is named by the first of its WordNet synonyms, or by all of them where another class has the same first.
    """
    base = root / "tiny-imagenet-200"
    ids = (base / "wnids.txt").read_text().split()
    synonyms = dict(line.split("\t") for line in (base / "words.txt").read_text().splitlines() if line)
    shared = Counter(synonyms[each].partition(",")[0] for each in ids)
    names = [first if shared[first := synonyms[each].partition(",")[0]] == 1 else synonyms[each] for each in ids]

    order = {each: label for label, each in enumerate(ids)}
    samples: list[tuple[str | Path, int]] = []
    for each in ids:
        with os.scandir(base / "train" / each / "images") as entries:
            samples += [(entry.path, order[each]) for entry in entries if entry.name.endswith(".JPEG")]
    for line in (base / "val" / "val_annotations.txt").read_text().splitlines():
        file, wnid = line.split("\t")[:2]  # the rest is a bounding box
        samples.append((base / "val" / "images" / file, order[wnid]))
    return _source(base, names, samples)


def _source(root: Path, class_names: Iterable[str], samples: Iterable[tuple[str | Path, int]]) -> FileSource:
    """The samples, each a file and its class, sorted by id, which is the path below `root`."""
    rows = sorted((Path(path).relative_to(root).as_posix(), Path(path), label) for path, label in samples)
    return FileSource(
        name="",
        class_names=[prompt_name(name) for name in class_names],
        template="",
        labels=np.array([label for _, _, label in rows], np.int64),
        ids=[sample for sample, _, _ in rows],
        paths=[path for _, path, _ in rows],
    )


def _pooled(splits: Sequence[Any]) -> list[tuple[Path, int]]:
    """The files and classes of all splits of a torchvision data set."""
    return [sample for split in splits for sample in zip(split._image_files, split._labels)]


def _by_folder(splits: Sequence[Any]) -> FileSource:
    """The files of all splits of a torchvision data set, with the folders as classes in alphabetical order."""
    paths = [path for split in splits for path in split._image_files]
    order = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
    return _source(splits[0]._images_folder, order, [(path, order[path.parent.name]) for path in paths])


def _class_folders(root: Path, splits: list[str], names: dict[str, str], ignored: Sequence[str] = ()) -> FileSource:
    """Every image in root/split/class. `names` maps each class folder to its name in a prompt.

    Raises:
        ValueError: a folder that is neither in `names` nor in `ignored`.
        OSError: a class without images.
    """
    order = {folder: label for label, folder in enumerate(names)}
    samples: list[tuple[str | Path, int]] = []
    for split in splits:
        if unknown := set(find_classes(root / split)[0]) - set(names) - set(ignored):
            raise ValueError(f"{root / split} holds {min(unknown)!r}, which is no class of it")
        samples += make_dataset(root / split, order, IMG_EXTENSIONS)
    return _source(root, list(names.values()), samples)


def _class_names(name: str) -> dict[str, str]:
    """Class folder → name in a prompt, in the data set's own order."""
    return json.loads((resources.files("fastdlp") / "assets" / "class-names.json").read_text())[name]
