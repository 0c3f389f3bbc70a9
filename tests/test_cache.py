"""Decode once; survive kills, damage, bad files and a full disk."""

from __future__ import annotations

import json
import os
import resource
import struct
import threading
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdlp.data.cache import Pixels, load_pixels
from fastdlp.data.registry import load_source
from fastdlp.data.sources import ArraySource, FileSource, ImageSource
from fastdlp.data.transform import Transform
from fastdlp.errors import FastdlpError

TRANSFORM = Transform(16, "shortest", "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, eq=False)
class Counting(ArraySource):
    """Counts what is opened, and fails on some."""

    opened: list[int]
    broken: tuple[int, ...] = ()

    def open(self, index: int) -> Image.Image:
        self.opened.append(index)
        if index in self.broken:
            raise OSError("image file is truncated")
        time.sleep(0.001 * (index % 3))  # so that threads finish out of order
        return super().open(index)


def _source(count: int = 20, broken: tuple[int, ...] = ()) -> Counting:
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 24), dtype=np.uint8)
    labels = np.arange(count) % 3
    return Counting("toy", ["a", "b", "c"], "a {}", labels, [f"s/{i}" for i in range(count)], images, [], broken)


def _rows(source: ImageSource, indices: list[int]) -> np.ndarray:
    return np.stack([TRANSFORM.to_uint8(ArraySource.open(source, i)) for i in indices])  # type: ignore[arg-type]


def test_decodes_once_then_maps(tmp_path: Path) -> None:
    source, steps = _source(600), []
    first = load_pixels(source, TRANSFORM, tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert isinstance(first.data, np.memmap)
    assert first.data.dtype == np.uint8
    assert np.array_equal(first.data, _rows(source, list(range(600))))
    assert not first.data.flags.writeable
    assert sorted(source.opened) == list(range(600))
    assert steps == [(i + 1, 600) for i in range(600)]
    assert np.array_equal(first.labels, source.labels)
    assert (first.ids, first.class_names, first.template) == (source.ids, ["a", "b", "c"], "a {}")
    assert (first.name, first.bad, first.fingerprint) == ("toy", [], source.fingerprint())

    second = load_pixels(source, TRANSFORM, tmp_path)
    assert len(source.opened) == 600
    assert np.array_equal(first.data, second.data)
    assert len(os.listdir(tmp_path)) == 2


def test_what_changes_the_pixels_makes_a_new_entry(tmp_path: Path) -> None:
    source = _source()
    load_pixels(source, TRANSFORM, tmp_path)
    load_pixels(source, replace(TRANSFORM, mean=(0.1, 0.2, 0.3)), tmp_path)
    assert len(source.opened) == 20
    assert load_pixels(source, replace(TRANSFORM, size=8), tmp_path).data.shape == (20, 3, 8, 8)
    load_pixels(source, replace(TRANSFORM, resize_mode="squash"), tmp_path)
    changed = source.images.copy()
    changed[3, 0, 0] ^= 1
    load_pixels(replace(source, images=changed), TRANSFORM, tmp_path)
    assert len(source.opened) == 80


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "longer",
        "empty",
        "header",
        "dtype",
        "count",
        "no json",
        "half json",
        "list",
        "other key",
        "bad index",
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    source = _source()
    good = load_pixels(source, TRANSFORM, tmp_path).data.copy()
    (npy,), (sidecar,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    record = json.loads(sidecar.read_text())
    if damage == "cut":
        os.truncate(npy, npy.stat().st_size - 1)
    elif damage == "longer":
        npy.write_bytes(npy.read_bytes() + b"x")
    elif damage == "empty":
        npy.write_bytes(b"")
    elif damage == "header":
        npy.write_bytes(b"\x00" * 200 + npy.read_bytes()[200:])
    elif damage == "dtype":
        np.save(npy, good.astype(np.int16))
    elif damage == "count":
        np.save(npy, good[:-1])
    elif damage == "no json":
        sidecar.unlink()
    elif damage == "half json":
        sidecar.write_text(sidecar.read_text()[:-9])
    elif damage == "list":
        sidecar.write_text("[]")
    elif damage == "other key":
        sidecar.write_text(json.dumps({**record, "key": "0"}))
    else:
        sidecar.write_text(json.dumps({**record, "bad": [[99, "?"]]}))
    source.opened.clear()
    assert np.array_equal(load_pixels(source, TRANSFORM, tmp_path).data, good)
    assert len(source.opened) == 20
    load_pixels(source, TRANSFORM, tmp_path)
    assert len(source.opened) == 20


def test_a_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_pixels(_source(), TRANSFORM, tmp_path, progress=stop)
    assert os.listdir(tmp_path) == []


def test_the_rest_of_a_kill_is_cleared_a_day_later(tmp_path: Path) -> None:
    load_pixels(_source(), TRANSFORM, tmp_path)
    (npy,), (sidecar,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    sidecar.unlink()
    old, young = (tmp_path / f".{npy.stem}.{age}.npy" for age in ("old", "young"))
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    load_pixels(_source(), TRANSFORM, tmp_path)
    assert not old.exists()
    assert young.exists()


def test_two_writers_at_once(tmp_path: Path) -> None:
    results: list[Pixels] = []
    threads = [
        threading.Thread(target=lambda: results.append(load_pixels(_source(60), TRANSFORM, tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for pixels in results:
        assert np.array_equal(pixels.data, _rows(_source(60), list(range(60))))
    assert len(os.listdir(tmp_path)) == 2


def test_bad_samples_are_counted_named_and_cached(tmp_path: Path) -> None:
    broken = (1, 4, 5, 8, 9, 10, 13)
    source = _source(broken=broken)
    with pytest.raises(FastdlpError) as caught:
        load_pixels(source, TRANSFORM, tmp_path)
    message = str(caught.value)
    assert message.startswith("7 of the 20 samples of toy cannot be read: s/1 (image file is truncated), s/4")
    assert "s/9" in message
    assert "s/10" not in message
    assert "and 2 more; " in message
    assert "--bad-images skip" in message
    assert len(source.opened) == 20

    for _ in range(2):
        pixels = load_pixels(source, TRANSFORM, tmp_path, on_bad="skip")
        good = [i for i in range(20) if i not in broken]
        assert np.array_equal(pixels.data, _rows(source, good))
        assert pixels.labels.tolist() == [i % 3 for i in good]
        assert pixels.ids == [f"s/{i}" for i in good]
        assert pixels.bad == [f"s/{i}: image file is truncated" for i in broken]
        assert pixels.fingerprint == source.fingerprint()
    with pytest.raises(FastdlpError, match="7 of the 20"):
        load_pixels(source, TRANSFORM, tmp_path, on_bad="refuse")
    assert len(source.opened) == 20  # nothing was decoded a second time


def test_a_class_without_a_good_sample(tmp_path: Path) -> None:
    source = _source(broken=tuple(range(1, 20, 3)))
    for _ in range(2):
        with pytest.raises(FastdlpError, match=r"no sample of 'b' can be read: s/1 \(image"):
            load_pixels(source, TRANSFORM, tmp_path, on_bad="skip")
    with pytest.raises(FastdlpError, match="none of the 20 samples of toy is a readable image"):
        load_pixels(_source(broken=tuple(range(20))), TRANSFORM, tmp_path / "other", on_bad="skip")


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_real_bad_files(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "good.jpg")
    Image.fromarray(noise[:, :, 0]).save(folder / "good.png")
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:-900])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:1500])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / "large.png").write_bytes(_png_header(10_000, 10_000))  # Pillow warns
    (folder / "bomb.png").write_bytes(_png_header(50_000, 50_000))  # Pillow refuses
    Image.new("RGB", (1, 60_000)).save(folder / "sliver.png")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    source = load_source(f"folder:{tmp_path / 'photos'}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_pixels(source, replace(TRANSFORM, size=224), tmp_path / "cache", on_bad="skip")
    assert pixels.ids == ["a/good.jpg", "a/good.png"]
    reasons = dict(line.removeprefix("a/").split(": ", 1) for line in pixels.bad)
    assert reasons["bomb.png"] == reasons["large.png"] == "more than 89 million pixels"
    assert reasons["text.jpg"] == reasons["empty.jpg"] == reasons["notes.txt"] == "not an image file"
    assert reasons["gone.jpg"] == "no such file or directory"
    assert "truncated" in reasons["cut.jpg"]
    assert "too narrow" in reasons["sliver.png"]
    assert "cut.png" in reasons
    assert len(reasons) == 9
    assert str(tmp_path) not in "".join(pixels.bad)
    with pytest.raises(FastdlpError, match=r"9 of the 11 samples .* and 4 more"):
        load_pixels(source, replace(TRANSFORM, size=224), tmp_path / "cache")

    assert isinstance(source, FileSource)
    Image.fromarray(noise).save(folder / "cut.jpg")  # mended: another fingerprint, so read anew
    assert "a/cut.jpg" in load_pixels(source, TRANSFORM, tmp_path / "cache", on_bad="skip").ids


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastdlpError, match=r"cannot write .*file/cache/toy-.*set \$FASTDLP_CACHE"):
        load_pixels(_source(), TRANSFORM, tmp_path / "file" / "cache")
    monkeypatch.setenv("FASTDLP_CACHE", str(tmp_path / "mine"))
    load_pixels(_source(), TRANSFORM)
    assert len(os.listdir(tmp_path / "mine")) == 2

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk, writing fails half-way
    try:
        with pytest.raises(FastdlpError, match=r"File too large; set \$FASTDLP_CACHE"):
            load_pixels(_source(), TRANSFORM, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "full") == []
