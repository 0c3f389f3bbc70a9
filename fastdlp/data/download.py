"""Downloads, unpacked in a temporary folder and moved into place when complete. No archive member escapes it."""

from __future__ import annotations

import os
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

TIMEOUT = 60.0
"""Seconds without a response after which a download fails."""


def download_folder(fetch: Callable[[Path], None], root: Path, folder: str) -> None:
    """Let `fetch` download and unpack into a temporary folder, then move the subfolder `folder` of it to root/folder.

    Not directly to `root`, because torchvision takes any folder of the right name for a complete one.

    Raises:
        Exception: whatever `fetch` raises; no file remains then.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary, _timeout(), confined_tar():
        fetch(Path(temporary))
        fetched = Path(temporary, folder)
        for archive in [*fetched.glob("*.tar.gz"), *fetched.glob("*.tgz"), *fetched.glob("raw/*.gz")]:
            archive.unlink()  # torchvision keeps it beside the unpacked files
        os.replace(fetched, root / folder)


def fetch_archive(url: str, md5: str, into: Path) -> None:
    """Download an archive (.zip, or .tar in any compression), check it and unpack it into the folder `into`.

    Raises:
        RuntimeError: the MD5 sum differs.
        tarfile.TarError, ValueError: a member would be written outside `into`.
    """
    from torchvision.datasets import utils

    utils.download_url(url, into, md5=md5)
    archive = into / url.rpartition("/")[2]
    unpack(archive, into)
    archive.unlink()


def unpack(archive: Path, into: Path) -> None:
    """Unpack an archive (.zip, or .tar in any compression) into the folder `into`; raises as `fetch_archive`."""
    if archive.suffix != ".zip":
        with tarfile.open(archive) as tar, confined_tar():
            tar.extractall(into)
        return
    with zipfile.ZipFile(archive) as zipped:
        for name in zipped.namelist():
            # zipfile would silently write such a member to `into` under another name.
            if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
                raise ValueError(f"{archive.name} holds {name!r}, which points outside its folder")
        zipped.extractall(into)


@contextmanager
def confined_tar() -> Iterator[None]:
    """Unpack every tar with Python's data filter inside the block, also those that torchvision unpacks.

    torchvision before 0.29 passes no filter, which Python before 3.14 takes for full trust. Python before 3.11.4 has no
    filter; `_refuse_outside` replaces it there.
    """
    name = "extraction_filter" if hasattr(tarfile, "data_filter") else "extractall"
    before = vars(tarfile.TarFile)[name]  # without the descriptor protocol: a static method or None

    def extractall(tar: tarfile.TarFile, path: str | os.PathLike[str] = ".", *args: Any, **options: Any) -> None:
        _refuse_outside(tar)
        before(tar, path, *args, **options)

    confined = staticmethod(tarfile.data_filter) if name == "extraction_filter" else extractall
    setattr(tarfile.TarFile, name, confined)
    try:
        yield
    finally:
        setattr(tarfile.TarFile, name, before)


def _refuse_outside(tar: tarfile.TarFile) -> None:
    """Raise tarfile.TarError for a member that could be written outside the folder; strip the root of absolute names.

    Stricter than Python's filter: no link upwards, no member below a link, only files, folders and links.
    """
    links: set[PurePosixPath] = set()
    for member in tar.getmembers():
        member.name = member.name.lstrip("/")
        path = PurePosixPath(member.name)
        targets = [PurePosixPath(member.linkname)] if member.issym() or member.islnk() else []
        upwards = any(".." in each.parts for each in (path, *targets))
        if upwards or any(target.is_absolute() for target in targets) or links & set(path.parents):
            raise tarfile.TarError(f"{member.name!r} would be written outside its folder")
        if not (member.isfile() or member.isdir() or targets):
            raise tarfile.TarError(f"{member.name!r} is neither a file nor a folder")
        if targets:
            links.add(path)


@contextmanager
def _timeout() -> Iterator[None]:
    """Limit urllib's waiting, which is unlimited by default; torchvision passes no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
