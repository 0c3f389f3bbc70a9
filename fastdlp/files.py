"""Atomic writes of files and folders: a reader sees the old content or the new, never a part of it.

If a write is interrupted (full disk, kill, power loss), the path holds its previous content. Every error of the
operating system becomes one line of `FastdlpError`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastdlp.errors import FastdlpError


@contextmanager
def os_errors(action: str, hint: str = "") -> Iterator[None]:
    """Report an OSError in the block as a FastdlpError: cannot `action`, the reason, and what to do (`hint`)."""
    try:
        yield
    except OSError as error:
        raise FastdlpError(f"cannot {action}: {error.strerror or error}{'; ' + hint if hint else ''}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str], hint: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block ends without an exception.

    The temporary file exists, is empty and hidden, and has the suffix of `path`. Missing folders are created. The
    block should only write: an OSError in it is reported as a failure to write `path`.

    Args:
        path: the file to write; a symbolic link is followed, not replaced.
        hint: what to do on failure, added to the message.

    Raises:
        FastdlpError: the path is a folder or a device, or the operating system refuses (full, read-only).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FastdlpError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'not a plain file'}")
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        with os_errors(f"write {path}", hint):
            target.parent.mkdir(parents=True, exist_ok=True)
            # os.open and not tempfile: the finished file gets the permissions that the user's umask gives.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # so that the rename cannot become durable before the content
            os.replace(temporary, target)
            _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside `path`; it is renamed to `path` when the block ends without an exception.

    Missing parent folders are created, and a symbolic link is followed. `path` must not exist, unless it is to be
    replaced; it is then kept until the new folder stands.

    Raises:
        FastdlpError: the operating system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        with os_errors(f"write {path}", "name another --out"):
            temporary.mkdir(parents=True)
            yield temporary
            if replace and target.exists():
                os.replace(target, old)  # os.replace cannot overwrite a folder that is not empty
            try:
                os.replace(temporary, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_free(path: Path, marker: str, kind: str, overwrite: bool) -> None:
    """Refuse a folder that must not be written or replaced. Cheap, so that it runs before a long preparation.

    It must be new or empty, or with `overwrite` one of the same kind ("run" or "sweep"), which holds the file `marker`.

    Raises:
        FastdlpError: names --out and what to do.
    """
    with os_errors(f"use {path}", "name another --out"):
        here = Path.cwd()
        if Path(os.path.realpath(path)) in (here, *here.parents):
            raise FastdlpError(f"{path} is or holds the working directory: name another --out")
        if (path / marker).is_file():
            if not overwrite:
                raise FastdlpError(
                    f"{path} holds a {kind}: continue with --resume {path}, or replace it with --overwrite"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FastdlpError(f"{path} exists and is not a {kind} folder: name another --out")


def remove_temporaries(folder: Path) -> None:
    """Remove the files of `atomic_path` that killed processes left in a folder and below."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{12}(\.[^.]+)?", path.name):
            path.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: bytes | str, hint: str = "") -> None:
    """Write `content` (text as UTF-8) to `path`, or leave `path` unchanged and raise FastdlpError."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path, hint) as temporary:
        temporary.write_bytes(data)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value in a JSON file. `what` names the file's role in messages ("partition").

    Raises:
        FastdlpError: the file is missing, unreadable or not JSON.
    """
    with os_errors(f"read the {what} file {path}"):
        content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FastdlpError(f"the {what} file {path} is not JSON: {error}") from error


def cache_root() -> Path:
    """Folder of reproducible files: $FASTDLP_CACHE, else $XDG_CACHE_HOME/fastdlp, else ~/.cache/fastdlp."""
    if own := os.environ.get("FASTDLP_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fastdlp"
    return Path("~/.cache/fastdlp").expanduser()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, except on systems that cannot open a folder (Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
