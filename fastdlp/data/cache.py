"""Cache of decoded, resized and cropped images: a file of bytes that later runs map into memory.

An entry is two files: `NAME.npy`, uint8 [n, 3, S, S], and `NAME.json`, which is written last and makes the entry valid.
NAME holds the SHA-256 of everything that the pixels depend on, so an entry is never outdated and may be deleted at any
time. Two processes that write the same entry at once write the same bytes.

Rows are written one after another and the file is mapped when complete, because writing to a mapped file on a full disk
kills the process.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import PIL
import torchvision
from PIL import Image

from fastdlp.data.sources import ImageSource, Samples, thread_count
from fastdlp.data.transform import Transform
from fastdlp.errors import FastdlpError
from fastdlp.files import atomic_path, cache_root, write_atomic

FORMAT_VERSION = 1
_HINT = "set $FASTDLP_CACHE to a writable folder with enough space"
_CHUNK = 256  # images decoded ahead of the file, which bounds the memory
_STALE = 24 * 3600  # age in seconds from which a temporary file is regarded as left by a killed run


@dataclass(frozen=True, eq=False)
class Pixels(Samples):
    """The readable samples of a data set, preprocessed.

    Attributes:
        data: uint8 [n, 3, S, S], the cache file mapped read-only.
        bad: "id: reason" for each sample that was dropped.
        fingerprint: of the source, dropped samples included.
    """

    data: np.ndarray
    bad: list[str]
    fingerprint: str


def load_pixels(
    source: ImageSource,
    transform: Transform,
    cache_dir: str | Path | None = None,
    on_bad: Literal["refuse", "skip"] = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Decode and transform every image of `source`, or map the result of an earlier call.

    Args:
        source: the images.
        transform: resizes and crops.
        cache_dir: folder of the cache; `fastdlp.files.cache_root()` if None.
        on_bad: whether files that are truncated, no images or too large are refused or skipped.
        progress: called as progress(done, total) while decoding.

    Raises:
        FastdlpError: bad samples and on_bad is "refuse"; a class without a readable sample; a cache folder that
            cannot be written.
    """
    fingerprint = source.fingerprint()
    # With the versions of decoder and resampler, which may round differently.
    parts = [str(FORMAT_VERSION), PIL.__version__, torchvision.__version__, transform.key(), fingerprint]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9]+", "-", source.name).strip("-")[:40] + f"-{transform.size}-{key[:32]}"
    entry = (Path(cache_dir).expanduser() if cache_dir is not None else cache_root()) / f"{name}.npy"

    shape = (3, transform.size, transform.size)
    found = _read_entry(entry, key, len(source), shape)
    if found is None:
        _write_entry(entry, key, source, transform, progress)
        found = _read_entry(entry, key, len(source), shape)
    if found is None:
        raise FastdlpError(f"the cache file {entry} cannot be read back: remove it and try again")
    data, bad = found
    _check_bad(source, bad, on_bad)
    good = [index for index in range(len(source)) if index not in bad]
    return Pixels(
        name=source.name,
        class_names=source.class_names,
        template=source.template,
        labels=source.labels[good],
        ids=[source.ids[index] for index in good],
        data=data,
        bad=[f"{source.ids[index]}: {reason}" for index, reason in bad.items()],
        fingerprint=fingerprint,
    )


def _check_bad(source: ImageSource, bad: dict[int, str], on_bad: str) -> None:
    """Raise FastdlpError unless bad samples may be skipped and every class has a readable one."""
    if not bad:
        return
    named = ", ".join(f"{source.ids[index]} ({reason})" for index, reason in list(bad.items())[:5])
    named += f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    if len(bad) == len(source):
        raise FastdlpError(f"none of the {len(source)} samples of {source.name} is a readable image: {named}")
    if on_bad == "refuse":
        raise FastdlpError(
            f"{len(bad)} of the {len(source)} samples of {source.name} cannot be read: {named}; "
            "repair or remove them, or pass --bad-images skip"
        )
    kept = np.delete(source.labels, list(bad))
    if lost := sorted(set(source.labels.tolist()) - set(kept.tolist())):
        classes = ", ".join(repr(source.class_names[label]) for label in lost)
        raise FastdlpError(f"no sample of {classes} can be read: {named}")


def _read_entry(entry: Path, key: str, total: int, shape: tuple[int, ...]) -> tuple[np.ndarray, dict[int, str]] | None:
    """The mapped pixels and the bad samples {index: reason}, or None if the entry is missing or damaged."""
    try:
        record = json.loads(entry.with_suffix(".json").read_bytes())
        if record["key"] != key:
            return None
        bad = {int(index): str(reason) for index, reason in record["bad"]}
        data = np.load(entry, mmap_mode="r", allow_pickle=False)
        whole = entry.stat().st_size == data.offset + data.nbytes
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    valid = data.shape == (total - len(bad), *shape) and data.dtype == np.uint8 and data.flags.c_contiguous
    return (data, bad) if whole and valid and all(0 <= index < total for index in bad) else None


def _write_entry(
    entry: Path,
    key: str,
    source: ImageSource,
    transform: Transform,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode everything and write the readable samples, and the bad ones {index: reason} in the entry's record.

    The entry does not depend on `on_bad`, so a data set that was refused is not decoded again to skip bad samples.
    """
    _remove_stale(entry)
    bad: dict[int, str] = {}
    with atomic_path(entry, _HINT) as temporary, open(temporary, "wb") as file:
        _write_header(file, len(source), transform.size)
        for index, (pixels, reason) in enumerate(_decode_all(source, transform)):
            if pixels is None:
                bad[index] = reason
            else:
                file.write(pixels.tobytes())
            if progress is not None:
                progress(index + 1, len(source))
        file.seek(0)
        _write_header(file, len(source) - len(bad), transform.size)
    record = {"format": "fastdlp-pixels", "key": key, "data": source.name, "bad": list(bad.items())}
    write_atomic(entry.with_suffix(".json"), json.dumps(record, indent=1), _HINT)


def _write_header(file: BinaryIO, count: int, size: int) -> None:
    """The .npy header of uint8 [count, 3, size, size], padded to a length that does not depend on the count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def _decode_all(source: ImageSource, transform: Transform) -> Iterator[tuple[np.ndarray | None, str]]:
    """Per sample, in order: (uint8 [3, S, S], "") or (None, reason). In threads, since Pillow releases the GIL."""

    def decode(index: int) -> tuple[np.ndarray | None, str]:
        try:
            return transform.to_uint8(source.open(index)), ""
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything for a damaged file
            return None, _reason(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(thread_count()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(source), _CHUNK):
            yield from pool.map(decode, range(start, min(start + _CHUNK, len(source))))


def _reason(error: Exception) -> str:
    """Why a sample cannot be read, without its path, which differs between machines."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image file"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {(Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:100] or type(error).__name__


def _remove_stale(entry: Path) -> None:
    """Remove temporary files of killed runs; those of a process that is still writing are younger."""
    with suppress(OSError):
        for path in entry.parent.glob(f".{entry.stem}.*.npy"):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
