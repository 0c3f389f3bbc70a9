"""A file holds its old content or its new, whatever happens in between."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastdlp.errors import FastdlpError
from fastdlp.files import atomic_path, cache_root, read_json, write_atomic


def test_writes_text_and_bytes_and_makes_folders(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "a.txt", "β\n")
    write_atomic(tmp_path / "new" / "b", b"\x00\xff")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "β\n".encode()
    assert (tmp_path / "new" / "b").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path / "new")) == ["a.txt", "b"]


def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".json"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_kill_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys; from fastdlp.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_is_one_line_and_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the kernel refuses to let files grow further
    try:
        with pytest.raises(FastdlpError, match=r"cannot write .*a\.bin: File too large; make room") as caught:
            write_atomic(path, bytes(5000), hint="make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_refuses_what_is_no_plain_file(tmp_path: Path) -> None:
    with pytest.raises(FastdlpError, match="it is a folder"):
        write_atomic(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FastdlpError, match="not a plain file"):
        write_atomic(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastdlpError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", "x")


def test_follows_a_link_and_gives_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    umask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "fresh", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


def test_read_json_errors(tmp_path: Path) -> None:
    write_atomic(tmp_path / "good.json", '{"a": [1]}')
    assert read_json(tmp_path / "good.json", "test") == {"a": [1]}
    with pytest.raises(FastdlpError, match=r"cannot read the test file .*No such file"):
        read_json(tmp_path / "none.json", "test")
    for text in (b"{", b"\xff\xfe\xfd", b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(FastdlpError, match=r"the test file .* is not JSON"):
            read_json(tmp_path / "bad.json", "test")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("FASTDLP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path("/h/.cache/fastdlp")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/fastdlp")
    monkeypatch.setenv("FASTDLP_CACHE", "~/own")
    assert cache_root() == Path("/h/own")
