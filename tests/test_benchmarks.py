"""Every benchmark loader against a small set in its true form on disk, and every way such a set can be wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdlp.data.registry import BENCHMARKS, DATASETS, load_source
from fastdlp.data.sources import ArraySource
from fastdlp.errors import FastdlpError
from tests.benchmark_files import SMALL, expect_flowers, idx, make_flowers, pickled, write_image, write_lines


@pytest.fixture(params=SMALL)
def small_set(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a set that lies in tmp_path/data."""
    _make(request.param, tmp_path / "data", monkeypatch)
    return request.param


def _make(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small set below `root` and return its folder."""
    SMALL[name].make(root)
    if name == "flowers":
        expect_flowers(monkeypatch, root / "flowers-102")
    return root / SMALL[name].folder


def _refusal(name: str, root: Path, download: bool = False) -> str:
    with pytest.raises(FastdlpError) as caught:
        load_source(name, root, download)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_name_has_a_loader_and_a_test() -> None:
    assert ("digits", *BENCHMARKS) == DATASETS
    assert list(SMALL) == list(BENCHMARKS)


def test_all_labelled_splits_are_pooled(small_set: str, tmp_path: Path) -> None:
    source, expected = load_source(small_set, tmp_path / "data"), SMALL[small_set]
    assert source.name == small_set
    assert source.template == expected.template
    assert source.template.count("{}") == 1
    assert list(zip(source.ids, (source.class_names[label] for label in source.labels))) == list(
        expected.samples.items()
    )
    assert source.ids == sorted(source.ids)
    assert source.labels.dtype == np.int64
    if isinstance(expected.classes, int):
        assert len(set(source.class_names)) == expected.classes
    else:
        assert source.class_names == expected.classes
    for index in range(0, len(source), max(1, len(source) // 5)):
        assert source.open(index).size == expected.size
    assert len(source.fingerprint()) == 64


def test_class_names_are_those_of_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's lists (data/prompts.md of CLIP), at the places where they differ from the folders' names."""

    def names(name: str) -> list[str]:
        _make(name, tmp_path, monkeypatch)
        return load_source(name, tmp_path).class_names

    flowers, countries, caltech = names("flowers"), names("country211"), names("caltech101")
    assert [flowers[i] for i in (0, 15, 59, 92, 101)] == [
        "pink primrose",
        "globe flower",
        "pink and yellow dahlia",
        "air plant",
        "blackberry lily",
    ]
    assert (len(countries), len(caltech)) == (211, 101)
    assert [countries[i] for i in (0, 34, 76, 207, 210)] == [
        "Andorra",
        "DR Congo",
        "South Georgia and South Sandwich Is.",
        "Yemen",
        "Zimbabwe",
    ]
    assert [caltech[i] for i in (0, 1, 19, 100)] == [
        "off-center face",
        "centered face",
        "side of a car",
        "yin and yang symbol",
    ]
    assert names("fashionmnist")[9] == "Ankle boot"


def test_cifar_pixels_are_planes_of_red_green_and_blue(tmp_path: Path) -> None:
    SMALL["cifar10"].make(tmp_path)
    picture = np.asarray(load_source("cifar10", tmp_path).open(3))
    assert picture.shape == (32, 32, 3)
    assert picture[1:].reshape(-1, 3).tolist() == [[10, 20, 30]] * 31 * 32
    assert picture[0, :, 2].tolist() == list(range(32))


def test_grey_arrays_keep_their_pixels(tmp_path: Path) -> None:
    for name in ("fer2013", "fashionmnist"):
        SMALL[name].make(tmp_path)
    faces, clothes = load_source("fer2013", tmp_path), load_source("fashionmnist", tmp_path)
    assert isinstance(faces, ArraySource)
    assert faces.images[:, 5, 5].tolist() == [3, 2, 0, 1]
    assert faces.open(0).mode == clothes.open(0).mode == "L"
    assert np.asarray(clothes.open(1)).ravel().tolist() == [i % 251 for i in range(784, 2 * 784)]


def test_both_tables_of_faces_are_one_set(tmp_path: Path) -> None:
    SMALL["fer2013"].make(tmp_path)
    before = load_source("fer2013", tmp_path).fingerprint()
    table = tmp_path / "fer2013" / "fer2013.csv"
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    write_lines(
        tmp_path / "fer2013" / "icml_face_data.csv",
        "emotion, Usage, pixels",
        *(f"{emotion},{usage},{pixels}" for emotion, pixels, usage in reversed(rows[2:])),
        *(f"{emotion},{usage},{pixels}" for emotion, pixels, usage in rows[:2]),
    )
    table.unlink()
    assert load_source("fer2013", tmp_path).fingerprint() == before


# What is missing.


@pytest.mark.parametrize("name", SMALL)
def test_a_missing_set_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = _refusal(name, tmp_path)
    assert f"(the folder {SMALL[name].folder})" in message
    assert "pass --data-dir" in message
    assert ("--download" in message) == (BENCHMARKS[name].fetch is not None)
    monkeypatch.setenv("FASTDLP_CACHE", str(tmp_path / "root"))
    with pytest.raises(FastdlpError, match="root/datasets does not hold"):
        load_source(name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "where"), [("cars", "pytorch/vision/issues/7545"), ("fer2013", "kaggle.com")])
def test_what_no_program_can_download_says_where_to_get_it(name: str, where: str, tmp_path: Path) -> None:
    message = _refusal(name, tmp_path / "data", download=True)
    assert "cannot be downloaded" in message
    assert where in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_pickles_are_not_read(name: str, folder: str, tmp_path: Path) -> None:
    for file in ("data_batch_1", "test_batch", "batches.meta", "train", "test", "meta"):
        pickled(tmp_path / folder / file, tmp_path / "executed")
    message = _refusal(name, tmp_path)
    assert f"only as Python pickles ({folder})" in message
    assert f"--download to fetch the binary version ({SMALL[name].folder})" in message
    assert not (tmp_path / "executed").exists()
    SMALL[name].make(tmp_path)
    assert load_source(name, tmp_path).ids == list(SMALL[name].samples)


def test_what_an_old_torchvision_left_is_not_unpickled(tmp_path: Path) -> None:
    SMALL["fashionmnist"].make(tmp_path)
    for file in ("training.pt", "test.pt"):
        pickled(tmp_path / "FashionMNIST" / "processed" / file, tmp_path / "executed")
    assert load_source("fashionmnist", tmp_path).ids == list(SMALL["fashionmnist"].samples)
    assert not (tmp_path / "executed").exists()


# What is damaged.

LISTS = {
    "pets": "annotations/test.txt",
    "flowers": "setid.mat",
    "aircraft": "data/images_variant_test.txt",
    "dtd": "dtd/labels/val1.txt",
    "cifar10": "data_batch_4.bin",
    "cifar100": "fine_label_names.txt",
    "tiny-imagenet": "val/val_annotations.txt",
    "caltech101": "101_ObjectCategories/Faces_easy/image_0001.jpg",
    "cars": "cars_test_annos_withlabels.mat",
    "country211": "valid/ZW/302053.jpg",
    "eurosat": "2750/SeaLake/SeaLake_1.jpg",
    "fer2013": "fer2013.csv",
    "fashionmnist": "raw/t10k-labels-idx1-ubyte",
    "food101": "meta/test.json",
    "sst2": "test/positive/2.png",
    "sun397": "ClassName.txt",
}


def test_a_set_without_one_of_its_files_is_refused(small_set: str, tmp_path: Path) -> None:
    (tmp_path / "data" / SMALL[small_set].folder / LISTS[small_set]).unlink()
    message = _refusal(small_set, tmp_path / "data")
    assert f"the data set {small_set} in {tmp_path}" in message
    assert "is incomplete or damaged (" in message
    assert ("remove that folder and pass --download" in message) == (BENCHMARKS[small_set].fetch is not None)


def test_an_empty_folder_is_refused(small_set: str, tmp_path: Path) -> None:
    (tmp_path / "none" / SMALL[small_set].folder).mkdir(parents=True)
    assert "is incomplete or damaged (" in _refusal(small_set, tmp_path / "none")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _append(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text() + text)


def _write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


GREY = " ".join(["7"] * 2304)
DAMAGE: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "flowers, labels": ("flowers", "imagelabels.mat", _cut, "corrupted"),
    "pets, a line": ("pets", "annotations/test.txt", _append("Bengal\n"), "not enough values"),
    "aircraft, unknown variant": ("aircraft", "data/images_variant_test.txt", _append("7 Zeppelin\n"), "'Zeppelin'"),
    "dtd, twice": ("dtd", "dtd/labels/val1.txt", _append("banded/banded_0001.jpg\n"), "banded_0001.jpg' 2 times"),
    "cifar10, cut off": ("cifar10", "test_batch.bin", _cut, "test_batch.bin has 3068 bytes"),
    "cifar10, empty": ("cifar10", "test_batch.bin", _write(b""), "test_batch.bin has 0 bytes"),
    "cifar10, label": ("cifar10", "test_batch.bin", _write(bytes([10] * 3073)), "labels beyond its 10 classes"),
    "cifar100, names": ("cifar100", "fine_label_names.txt", _append("apple\n"), "the class 'apple' 2 times"),
    "tiny-imagenet, unknown": (
        "tiny-imagenet",
        "val/val_annotations.txt",
        _append("val_2.JPEG\tn0\t0\t1\t2\t3\n"),
        "nothing is known of 'n0'",
    ),
    "tiny-imagenet, words": ("tiny-imagenet", "words.txt", _write(b"n02124075\tEgyptian cat\n"), "'n03126707'"),
    "tiny-imagenet, form": ("tiny-imagenet", "words.txt", _write(b"entity\n"), "dictionary update"),
    "caltech101, folder": ("caltech101", "101_ObjectCategories/Dog/1.jpg", write_image, "'Dog', which is no class"),
    "cars, no mat": ("cars", "devkit/cars_meta.mat", _write(b"no mat file at all"), "Mat file appears to be truncated"),
    "cars, cut off": ("cars", "cars_test_annos_withlabels.mat", _halve, "could not read bytes"),
    "country211, folder": ("country211", "test/QQ/1.jpg", write_image, "'QQ', which is no class"),
    "fer2013, pixels": ("fer2013", "fer2013.csv", _append("0,1 2 3,Training\n"), "line 6 of fer2013.csv is no image"),
    "fer2013, cut off": ("fer2013", "fer2013.csv", _append("0,1 2"), "line 6 of fer2013.csv is no image"),
    "fer2013, bright": (
        "fer2013",
        "fer2013.csv",
        _append(f"0,{GREY.replace('7', '256')},Training\n"),
        "line 6 of fer2013.csv is no image",
    ),
    "fer2013, emotion": ("fer2013", "fer2013.csv", _append(f"7,{GREY},Training\n"), "labels beyond its 7 classes"),
    "fer2013, usage": ("fer2013", "fer2013.csv", _append(f"6,{GREY},Other\n"), "nothing is known of 'Other'"),
    "fer2013, train only": (
        "fer2013",
        "fer2013.csv",
        _write(f"emotion,pixels,Usage\n0,{GREY},Training\n".encode()),
        "fer2013.csv has no line of PublicTest",
    ),
    "fer2013, header": ("fer2013", "fer2013.csv", _write(f"emotion,pixels\n0,{GREY}\n".encode()), "'Usage'"),
    "fashionmnist, cut off": ("fashionmnist", "raw/train-images-idx3-ubyte", _cut, "shape|size"),
    "fashionmnist, short": (
        "fashionmnist",
        "raw/train-labels-idx1-ubyte",
        _write(idx(np.array([1]))),
        "train has 3 images and 1 labels",
    ),
    "fashionmnist, no idx": ("fashionmnist", "raw/t10k-labels-idx1-ubyte", _write(b"PK\3\4"), "AssertionError"),
    "food101, no JSON": ("food101", "meta/train.json", _cut, "line 1 column"),
    "food101, a list": ("food101", "meta/train.json", _write(b"[]"), "'list' object"),
    "sst2, folder": ("sst2", "train/neutral/1.png", write_image, "'neutral', which is no class"),
    "sun397, class": ("sun397", "ClassName.txt", _write(b"/a/abbey\n"), "'(apartment|batters)"),
    "sun397, blank": ("sun397", "ClassName.txt", _append("\n"), "a class without a name"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, file, damage, words = DAMAGE[case]
    folder = _make(name, tmp_path, monkeypatch)
    damage(folder / file)
    with pytest.raises(
        FastdlpError, match=rf"the data set {name} in .* is incomplete or damaged \(.*{words}"
    ) as caught:
        load_source(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_flowers_with_altered_labels_is_refused(tmp_path: Path) -> None:
    make_flowers(tmp_path)  # and the true checksums in force
    assert "incomplete or damaged" in _refusal("flowers", tmp_path)


def test_a_set_without_samples_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "SUN397"
    write_lines(folder / "ClassName.txt", "/a/abbey")
    assert "it lists no samples" in _refusal("sun397", tmp_path)


def test_a_broken_image_stays_listed(tmp_path: Path) -> None:
    """Images are decoded later, where a choice between refusing and skipping is given."""
    SMALL["eurosat"].make(tmp_path)
    broken = tmp_path / "eurosat" / "2750" / "River" / "River_1.jpg"
    broken.write_bytes(b"x")
    source = load_source("eurosat", tmp_path)
    with pytest.raises(Image.UnidentifiedImageError):
        source.open(source.ids.index("River/River_1.jpg"))
