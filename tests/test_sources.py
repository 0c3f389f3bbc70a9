"""Names, digits, folders of one's own, and what every source offers. The benchmarks have files of their own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdlp.data.registry import DATASETS, load_source
from fastdlp.errors import FastdlpError
from tests.benchmark_files import write_image, write_lines


def test_unknown_names_list_the_known_ones() -> None:
    for name in ("", "Pets", "imagenet"):
        with pytest.raises(FastdlpError, match=r"digits, pets, .*, dtd, cifar10, .*, sun397 or folder:PATH"):
            load_source(name)
    with pytest.raises(FastdlpError, match="needs a path"):
        load_source("folder:")


def test_the_names_load_nothing_heavy() -> None:
    code = (
        "import sys; from fastdlp.data.registry import DATASETS, check_name\n"
        "print([m for m in ('torch', 'torchvision', 'sklearn', 'scipy') if m in sys.modules], len(DATASETS))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"[] {len(DATASETS)}"


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = load_source("digits")
    assert len(source) == 1797
    assert source.class_names[:3] == ["zero", "one", "two"]
    assert source.ids[17] == "digits/00017"
    assert source.template.format(source.class_names[9]) == "a photo of the digit nine"
    image = source.open(17)
    assert image.mode == "L"
    raw = load_digits()
    assert np.array_equal(np.asarray(image), [[round(v * 255 / 16) for v in row] for row in raw.images[17]])
    assert np.array_equal(source.labels, raw.target)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write_image(root / "red_delicious" / "b.JPG")
    write_image(root / "red_delicious" / "a.png")
    write_image(root / "Granny-Smith" / "1.webp", 20)
    write_lines(root / "red_delicious" / "notes.txt", "hello")
    write_lines(root / "red_delicious" / ".hidden.jpg", "hello")
    write_lines(root / ".git" / "x", "hello")
    write_lines(root / "README.md", "hello")
    return root


def test_folder(photos: Path) -> None:
    source = load_source(f"folder:{photos}")
    assert source.name == "folder:photos"
    assert source.class_names == ["Granny Smith", "red delicious"]
    assert source.ids == [
        "Granny-Smith/1.webp",
        *(f"red_delicious/{n}" for n in ("a.png", "b.JPG", "notes.txt")),
    ]
    assert source.labels.tolist() == [0, 1, 1, 1]
    assert source.template == "a photo of a {}."
    assert source.open(2).size == (9, 7)
    with pytest.raises(ValueError, match="not an image file"):
        source.open(3)


def test_folder_errors(photos: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(FastdlpError) as caught:
            load_source(f"folder:{path}")
        return str(caught.value)

    assert "is not a folder" in message(tmp_path / "none")
    assert "is not a folder" in message(photos / "README.md")
    assert "holds no class folders" in message(photos / "red_delicious")
    assert "pass the folder whose folders are the classes" in message(tmp_path)
    (photos / "empty").mkdir()
    assert "photos/empty holds no images" in message(photos)
    write_lines(photos / "empty" / "notes.txt", "hello")
    assert "photos/empty holds no images" in message(photos)
    (photos / "empty").rename(photos / "red-delicious")
    write_image(photos / "red-delicious" / "a.png")
    assert "'red_delicious'" in message(photos)
    assert "'red delicious'" in message(photos)
    (photos / "red-delicious").rename(photos / "__")
    assert "rename it" in message(photos)


def test_a_file_cannot_run_ghostscript(photos: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    (photos / "red_delicious" / "b.JPG").write_bytes(buffer.getvalue())
    (photos / "red_delicious" / "a.png").rename(photos / "red_delicious" / "z.eps")
    source = load_source(f"folder:{photos}")
    with pytest.raises(OSError, match="cannot identify"):
        source.open(source.ids.index("red_delicious/b.JPG"))
    with pytest.raises(ValueError, match="not an image file"):
        source.open(source.ids.index("red_delicious/z.eps"))


def test_16_bit_grey_keeps_its_shades(photos: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(photos / "Granny-Smith" / "1.png")
    Image.fromarray(ramp.astype(np.float32)).save(photos / "Granny-Smith" / "2.tiff")
    source = load_source(f"folder:{photos}")
    image = source.open(0)
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(int).ravel() - np.arange(256)).max() <= 1
    with pytest.raises(ValueError, match="floating-point"):
        source.open(2)


def test_the_fingerprint_follows_ids_labels_and_bytes(photos: Path) -> None:
    def fingerprint() -> str:
        return load_source(f"folder:{photos}").fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    os.utime(photos / "red_delicious" / "a.png", (1, 1))
    photos.rename(photos.with_name("moved"))
    photos = photos.with_name("moved")
    assert fingerprint() == seen[0]  # neither time nor place count
    write_image(photos / "red_delicious" / "a.png", 91)
    seen.append(fingerprint())
    (photos / "red_delicious" / "a.png").rename(photos / "red_delicious" / "aa.png")
    seen.append(fingerprint())
    (photos / "red_delicious" / "aa.png").rename(photos / "Granny-Smith" / "aa.png")
    seen.append(fingerprint())
    (photos / "Granny-Smith" / "aa.png").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_the_fingerprint_differs_by_names_and_labels() -> None:
    source = load_source("digits")
    changed = [
        source,
        replace(source, ids=["digits/0000x", *source.ids[1:]]),
        replace(source, labels=np.roll(source.labels, 1)),
        replace(source, ids=source.ids[:-1], labels=source.labels[:-1]),
    ]
    assert len({each.fingerprint() for each in changed}) == 4
    assert len(source.fingerprint()) == 64
