"""Every loader against small files in the data sets' true form on disk, and every way they can be wrong."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from fastdlp.data.sources import DATASETS, load_source
from fastdlp.errors import FastdlpError


def _image(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (shade, 20, 30)).save(path)


def _lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _make_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "Abyssinian_2", "american_bulldog_7", "basset_hound_10", "basset_hound_2"):
        _image(base / "images" / f"{name}.jpg")
    _lines(
        base / "annotations" / "trainval.txt",
        "Abyssinian_1 1 1 1",
        "american_bulldog_7 2 2 1",
        "basset_hound_2 3 2 2",
    )
    _lines(base / "annotations" / "test.txt", "Abyssinian_2 1 1 1", "basset_hound_10 3 2 2")


def _make_flowers(root: Path) -> None:
    base = root / "flowers-102"
    for number in range(1, 7):
        _image(base / "jpg" / f"image_{number:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[60, 1, 1, 102, 60, 2]], np.uint8)})
    splits = {"trnid": [[6, 1]], "valid": [[2, 4]], "tstid": [[3, 5]]}
    savemat(base / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in splits.items()})


def _make_aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    for name in ("1025794", "0034309", "0200000"):
        _image(base / "images" / f"{name}.jpg")
    _lines(base / "variants.txt", "707-320", "DHC-8-100", "Spitfire", "F-16A/B", "Gulfstream IV")
    _lines(base / "images_variant_trainval.txt", "1025794 707-320", "0200000 Gulfstream IV")
    _lines(base / "images_variant_test.txt", "0034309 F-16A/B")


def _make_dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    names = ("banded/banded_0002.jpg", "polka-dotted/polka-dotted_0001.jpg", "banded/banded_0001.jpg")
    for name, split in zip(names, ("train", "val", "test")):
        _image(base / "images" / name)
        _lines(base / "labels" / f"{split}1.txt", name)


MAKERS = {"pets": _make_pets, "flowers": _make_flowers, "aircraft": _make_aircraft, "dtd": _make_dtd}
FOLDERS = {
    "pets": "oxford-iiit-pet",
    "flowers": "flowers-102",
    "aircraft": "fgvc-aircraft-2013b",
    "dtd": "dtd",
}


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _expect_flowers(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Let torchvision's checksum test pass on the small label files: it runs, against their own sums."""
    files = dict(datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        files[key] = (files[key][0], _md5(base / files[key][0]))
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


@pytest.fixture(params=MAKERS)
def benchmark_set(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    MAKERS[request.param](tmp_path / "data")
    if request.param == "flowers":
        _expect_flowers(monkeypatch, tmp_path / "data" / "flowers-102")
    return request.param


EXPECTED = {
    "pets": (
        ["Abyssinian", "american bulldog", "basset hound"],
        {
            "Abyssinian_1.jpg": 0,
            "Abyssinian_2.jpg": 0,
            "american_bulldog_7.jpg": 1,
            "basset_hound_10.jpg": 2,
            "basset_hound_2.jpg": 2,
        },
        "a photo of a {}, a type of pet.",
    ),
    "flowers": (
        None,
        {
            "image_00001.jpg": 59,
            "image_00002.jpg": 0,
            "image_00003.jpg": 0,
            "image_00004.jpg": 101,
            "image_00005.jpg": 59,
            "image_00006.jpg": 1,
        },
        "a photo of a {}, a type of flower.",
    ),
    "aircraft": (
        ["707-320", "DHC-8-100", "Spitfire", "F-16A/B", "Gulfstream IV"],
        {"0034309.jpg": 3, "0200000.jpg": 4, "1025794.jpg": 0},
        "a photo of a {}, a type of aircraft.",
    ),
    "dtd": (
        ["banded", "polka-dotted"],
        {"banded/banded_0001.jpg": 0, "banded/banded_0002.jpg": 0, "polka-dotted/polka-dotted_0001.jpg": 1},
        "a photo of a {} texture.",
    ),
}


def test_benchmarks_pool_their_splits(benchmark_set: str, tmp_path: Path) -> None:
    source = load_source(benchmark_set, tmp_path / "data")
    class_names, samples, template = EXPECTED[benchmark_set]
    assert source.name == benchmark_set
    assert source.template == template
    assert dict(zip(source.ids, source.labels.tolist())) == samples
    assert source.ids == sorted(source.ids)
    assert source.labels.dtype == np.int64
    assert class_names is None or source.class_names == class_names
    for index in range(len(source)):
        assert source.open(index).size == (9, 7)


def test_flowers_has_its_102_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_flowers(tmp_path)
    _expect_flowers(monkeypatch, tmp_path / "flowers-102")
    names = load_source("flowers", tmp_path).class_names
    assert len(set(names)) == 102
    assert [names[i] for i in (0, 59, 101)] == ["pink primrose", "pink-yellow dahlia", "blackberry lily"]


def test_flowers_with_altered_labels_is_refused(tmp_path: Path) -> None:
    _make_flowers(tmp_path)  # and the true checksums in force
    with pytest.raises(FastdlpError, match=r"flowers .* is incomplete or damaged .*remove that folder"):
        load_source("flowers", tmp_path)


def test_a_benchmark_with_a_missing_list_is_refused(benchmark_set: str, tmp_path: Path) -> None:
    for pattern in ("*test.txt", "setid.mat", "val1.txt"):
        for path in (tmp_path / "data").rglob(pattern):
            path.unlink()
    with pytest.raises(FastdlpError, match=rf"{benchmark_set} .* is incomplete or damaged") as caught:
        load_source(benchmark_set, tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_benchmark_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastdlpError, match=rf"{FOLDERS[name]}\): pass --data-dir .* or --download"):
        load_source(name, tmp_path)
    monkeypatch.setenv("FASTDLP_CACHE", str(tmp_path / "root"))
    with pytest.raises(FastdlpError, match="root/datasets does not hold"):
        load_source(name)
    assert os.listdir(tmp_path) == []


# Downloads, from a server on this machine.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves tmp_path/site; torchvision's addresses point there, with the true sums of what lies there."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    made, site = tmp_path / "made", tmp_path / "site"
    site.mkdir()
    for maker in MAKERS.values():
        maker(made)
    parts = {
        "images.tar.gz": (made / "oxford-iiit-pet", "images"),
        "annotations.tar.gz": (made / "oxford-iiit-pet", "annotations"),
        "102flowers.tgz": (made / "flowers-102", "jpg"),
        "fgvc-aircraft-2013b.tar.gz": (made, "fgvc-aircraft-2013b"),
        "dtd-r1.0.1.tar.gz": (made / "dtd", "dtd"),
    }
    for archive, (folder, member) in parts.items():
        with tarfile.open(site / archive, "w:gz") as tar:
            tar.add(folder / member, member)
    for name in ("imagelabels.mat", "setid.mat"):
        (made / "flowers-102" / name).rename(site / name)

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        _point_torchvision_at(monkeypatch, f"http://127.0.0.1:{http.server_port}/", site)
        yield str(site)
        http.shutdown()
        thread.join()


def _point_torchvision_at(monkeypatch: pytest.MonkeyPatch, url: str, site: Path) -> None:
    pets = tuple((url + name, _md5(site / name)) for name in ("images.tar.gz", "annotations.tar.gz"))
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", pets)
    files = {key: (name, _md5(site / name)) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", url)
    monkeypatch.setattr(datasets.FGVCAircraft, "_URL", url + "fgvc-aircraft-2013b.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_URL", url + "dtd-r1.0.1.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_MD5", _md5(site / "dtd-r1.0.1.tar.gz"))


@pytest.mark.parametrize("name", MAKERS)
def test_download(name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir = tmp_path / "new" / "data"
    source = load_source(name, data_dir, download=True)
    assert dict(zip(source.ids, source.labels.tolist())) == EXPECTED[name][1]
    assert source.open(0).size == (9, 7)
    assert os.listdir(data_dir) == [FOLDERS[name]]
    assert not list(data_dir.rglob("*gz"))
    for file in Path(server).iterdir():
        file.unlink()
    assert load_source(name, data_dir, download=True).ids == source.ids  # nothing is fetched twice


@pytest.mark.parametrize("name", MAKERS)
def test_a_broken_download_leaves_nothing(name: str, server: str, tmp_path: Path) -> None:
    """The sums no longer fit, or, for aircraft, which has none, the archive is cut off."""
    for file in Path(server).glob("*gz"):
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(FastdlpError, match=f"cannot download the data set {name} .*--data-dir") as caught:
        load_source(name, tmp_path / "data", download=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("name", MAKERS)
def test_a_download_without_a_network_names_the_cause(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    _point_torchvision_at(monkeypatch, url, Path(server))
    with pytest.raises(FastdlpError, match=rf"cannot download the data set {name} .*Connection refused; try again"):
        load_source(name, tmp_path / "data", download=True)
    assert os.listdir(tmp_path / "data") == []
    assert socket.getdefaulttimeout() is None


def test_a_download_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / "mine").write_text("x")
    with pytest.raises(FastdlpError, match="incomplete or damaged"):
        load_source("dtd", tmp_path, download=True)
    assert (tmp_path / "dtd" / "mine").read_text() == "x"


# Names, digits, folders.


def test_unknown_names_list_the_known_ones() -> None:
    for name in ("", "Pets", "imagenet"):
        with pytest.raises(FastdlpError, match="digits, pets, flowers, aircraft, dtd or folder:PATH"):
            load_source(name)
    with pytest.raises(FastdlpError, match="needs a path"):
        load_source("folder:")


def test_the_names_load_nothing_heavy() -> None:
    code = (
        "import sys; from fastdlp.data.sources import DATASETS; from fastdlp.data.names import check_name\n"
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
    _image(root / "red_delicious" / "b.JPG")
    _image(root / "red_delicious" / "a.png")
    _image(root / "Granny-Smith" / "1.webp", 20)
    _lines(root / "red_delicious" / "notes.txt", "hello")
    _lines(root / "red_delicious" / ".hidden.jpg", "hello")
    _lines(root / ".git" / "x", "hello")
    _lines(root / "README.md", "hello")
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
    _lines(photos / "empty" / "notes.txt", "hello")
    assert "photos/empty holds no images" in message(photos)
    (photos / "empty").rename(photos / "red-delicious")
    _image(photos / "red-delicious" / "a.png")
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
    _image(photos / "red_delicious" / "a.png", 91)
    seen.append(fingerprint())
    (photos / "red_delicious" / "a.png").rename(photos / "red_delicious" / "aa.png")
    seen.append(fingerprint())
    (photos / "red_delicious" / "aa.png").rename(photos / "Granny-Smith" / "aa.png")
    seen.append(fingerprint())
    (photos / "Granny-Smith" / "aa.png").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_the_fingerprint_tells_apart_names_and_labels() -> None:
    source = load_source("digits")
    changed = [
        source,
        replace(source, ids=["digits/0000x", *source.ids[1:]]),
        replace(source, labels=np.roll(source.labels, 1)),
        replace(source, ids=source.ids[:-1], labels=source.labels[:-1]),
    ]
    assert len({each.fingerprint() for each in changed}) == 4
    assert len(source.fingerprint()) == 64
