"""The sets whose samples are image files, all labelled splits pooled: one small function per set lists them.

These functions are all that touches torchvision's own fields. Class names are those of OpenAI's zero-shot
evaluation of CLIP (data/prompts.md in its repository) where it has the set. A function raises whatever a missing
or altered file makes it raise.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from fastdlp.data.sources import FileSource


@dataclass(frozen=True)
class Listing:
    """The pooled samples of one set.

    Attributes:
        root: the folder that sample ids are relative to.
        class_names: as in a prompt, but for underscores.
        samples: each file with its class, an index into class_names.
    """

    root: Path
    class_names: Sequence[str]
    samples: Iterable[tuple[str | Path, int]]

    def source(self, name: str, template: str) -> FileSource:
        """The samples sorted by id, which is the path below `root`."""
        found = [(Path(path), label) for path, label in self.samples]
        rows = sorted((path.relative_to(self.root).as_posix(), path, label) for path, label in found)
        return FileSource(
            name=name,
            class_names=[spaced(each) for each in self.class_names],
            template=template,
            labels=np.array([label for _, _, label in rows], np.int64),
            ids=[sample for sample, _, _ in rows],
            paths=[path for _, path, _ in rows],
        )


def spaced(name: str) -> str:
    """A class name as words for a prompt: single spaces for underscores."""
    return " ".join(name.replace("_", " ").split())


def pets(root: Path) -> Listing:
    from torchvision.datasets import OxfordIIITPet

    splits = [OxfordIIITPet(root, split, target_types="category") for split in ("trainval", "test")]
    # A breed's name stands in the file names alone: american_bulldog_100.jpg.
    breeds = {
        label: path.stem.rpartition("_")[0] for split in splits for path, label in zip(split._images, split._labels)
    }
    order = {label: index for index, label in enumerate(sorted(breeds))}
    samples = [(path, order[label]) for split in splits for path, label in zip(split._images, split._labels)]
    return Listing(splits[0]._images_folder, [breeds[label] for label in order], samples)


def flowers(root: Path) -> Listing:
    from torchvision.datasets import Flowers102

    splits = [Flowers102(root, split) for split in ("train", "val", "test")]
    openai = {"globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"}
    samples = [sample for split in splits for sample in zip(split._image_files, split._labels)]
    return Listing(splits[0]._images_folder, [openai.get(name, name) for name in Flowers102.classes], samples)


def aircraft(root: Path) -> Listing:
    from torchvision.datasets import FGVCAircraft

    splits = [FGVCAircraft(root, split, annotation_level="variant") for split in ("trainval", "test")]
    samples = [sample for split in splits for sample in zip(split._image_files, split._labels)]
    return Listing(Path(splits[0]._data_path, "data", "images"), splits[0].classes, samples)


def dtd(root: Path) -> Listing:
    from torchvision.datasets import DTD

    splits = [DTD(root, split, partition=1) for split in ("train", "val", "test")]
    return _by_folder(splits[0]._images_folder, [path for split in splits for path in split._image_files])


def food101(root: Path) -> Listing:
    from torchvision.datasets import Food101

    splits = [Food101(root, split) for split in ("train", "test")]
    return _by_folder(splits[0]._images_folder, [path for split in splits for path in split._image_files])


def cars(root: Path) -> Listing:
    from torchvision.datasets import StanfordCars

    splits = [StanfordCars(root, split) for split in ("train", "test")]
    return Listing(splits[0]._base_folder, splits[0].classes, [sample for split in splits for sample in split._samples])


def sun397(root: Path) -> Listing:
    from torchvision.datasets import SUN397

    whole = SUN397(root)
    names = [name.replace("/", " ") for name in whole.classes]  # apartment_building/outdoor
    return Listing(whole._data_dir, names, list(zip(whole._image_files, whole._labels)))


def caltech101(root: Path) -> Listing:
    """All 101 categories, Faces and Faces_easy apart as in OpenAI's list; the clutter of BACKGROUND_Google is none."""
    folder = root / "caltech101" / "101_ObjectCategories"
    return _class_folders(folder, [""], _class_names("caltech101"), beside=["BACKGROUND_Google"])


def country211(root: Path) -> Listing:
    return _class_folders(root / "country211", ["train", "valid", "test"], _class_names("country211"))


def eurosat(root: Path) -> Listing:
    return _class_folders(root / "eurosat" / "2750", [""], _class_names("eurosat"))


def sst2(root: Path) -> Listing:
    names = {"negative": "negative", "positive": "positive"}
    return _class_folders(root / "rendered-sst2", ["train", "valid", "test"], names)


def tiny_imagenet(root: Path) -> Listing:
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
    return Listing(base, names, samples)


def _by_folder(root: Path, paths: list[Path]) -> Listing:
    """Files whose folder is their class; the classes in alphabetical order."""
    names = sorted({path.parent.name for path in paths})
    order = {name: label for label, name in enumerate(names)}
    return Listing(root, names, [(path, order[path.parent.name]) for path in paths])


def _class_folders(root: Path, splits: list[str], names: dict[str, str], beside: Sequence[str] = ()) -> Listing:
    """Every image in root/split/class. `names` gives the prompt's name of each class folder.

    Raises:
        ValueError: a folder that is neither in `names` nor in `beside`.
        OSError: a class without images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    order = {folder: label for label, folder in enumerate(names)}
    samples: list[tuple[str | Path, int]] = []
    for split in splits:
        if unknown := set(find_classes(root / split)[0]) - set(names) - set(beside):
            raise ValueError(f"{root / split} holds {min(unknown)!r}, which is no class of it")
        samples += make_dataset(root / split, order, IMG_EXTENSIONS)
    return Listing(root, list(names.values()), samples)


def _class_names(name: str) -> dict[str, str]:
    """The names of a set's class folders in a prompt, in the set's own order."""
    return json.loads((resources.files("fastdlp") / "assets" / "class-names.json").read_text())[name]
