"""Downloads of every benchmark that has one: whole or not at all, and never written outside its folder."""

from __future__ import annotations

import io
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision import datasets
from torchvision.datasets import utils

from fastdlp.data.download import confined_tar, fetch_archive
from fastdlp.data.registry import BENCHMARKS, load_source
from fastdlp.errors import FastdlpError
from tests.benchmark_files import SMALL, expect_flowers, md5, tar_bytes, write_archives

FETCHED = [name for name, benchmark in BENCHMARKS.items() if benchmark.fetch is not None]
SERVED = ["pets", "flowers", "aircraft", "dtd"]


# With the network function replaced by one that copies a file of the same name.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that downloads are copied from; it holds nothing yet."""
    site = tmp_path / "site"
    site.mkdir()

    def copy(url: str, root: str | Path, filename: str | None = None, md5: str | None = None, **_: object) -> None:
        assert md5 is not None or "aircraft" in url, f"no checksum is asked of {url}"
        Path(root).mkdir(parents=True, exist_ok=True)
        shutil.copy(site / url.rpartition("/")[2], Path(root, filename or url.rpartition("/")[2]))

    monkeypatch.setattr(utils, "download_url", copy)
    monkeypatch.setattr(datasets.flowers102, "download_url", copy)
    return site


@pytest.fixture(params=["python", "hand"])
def confined_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own filter (where it has one, from 3.11.4 on), and what stands in for it."""
    if request.param == "hand":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


def _publish(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small set's archives into tmp_path/site."""
    SMALL[name].make(tmp_path / "made")
    if name == "flowers":
        expect_flowers(monkeypatch, tmp_path / "made" / "flowers-102")
    write_archives(name, tmp_path / "made", tmp_path / "site")


@pytest.mark.parametrize("name", FETCHED)
def test_a_download_is_what_lies_there_later(
    name: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(name, tmp_path, monkeypatch)
    data_dir = tmp_path / "new" / "data"
    source = load_source(name, data_dir, download=True)
    assert source.ids == list(SMALL[name].samples)
    assert source.open(0).size == SMALL[name].size
    assert source.fingerprint() == load_source(name, tmp_path / "made").fingerprint()
    assert os.listdir(data_dir) == [SMALL[name].folder]
    assert not [path for path in data_dir.rglob("*") if path.suffix in (".gz", ".tgz", ".zip")]
    shutil.rmtree(site)
    assert load_source(name, data_dir, download=True).ids == source.ids  # nothing is fetched twice


@pytest.mark.parametrize("name", FETCHED)
def test_a_broken_archive_leaves_nothing(
    name: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(name, tmp_path, monkeypatch)
    for archive in SMALL[name].archives:
        (site / archive).write_bytes((site / archive).read_bytes()[:-200])
    message = _refused(name, tmp_path / "data")
    assert f"cannot download the data set {name} to {tmp_path / 'data'}: " in message


def _refused(name: str, data_dir: Path) -> str:
    """The one line with which a download ends that leaves nothing."""
    with pytest.raises(FastdlpError) as caught:
        load_source(name, data_dir, download=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(data_dir) == []
    return str(caught.value)


# Archives that point outside.


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


EVIL: dict[str, Callable[[Path], list[tarfile.TarInfo]]] = {
    "parent": lambda outside: [_member("../../escaped")],
    "inner parent": lambda outside: [_member("dtd/../../../escaped")],
    "link": lambda outside: [_member("way", tarfile.SYMTYPE, str(outside)), _member("way/escaped")],
    "relative link": lambda outside: [_member("way", tarfile.SYMTYPE, "../.."), _member("way/escaped")],
    "hard link": lambda outside: [_member("mine", tarfile.LNKTYPE, "../../secret")],
    "device": lambda outside: [_member("null", tarfile.CHRTYPE)],
}


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("name", ["dtd", "cifar10", "caltech101"])
@pytest.mark.usefixtures("confined_by")
def test_a_tar_that_points_outside_is_refused(
    name: str, evil: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through torchvision, through our own function, and inside a zip."""
    _publish(name, tmp_path, monkeypatch)
    outside = tmp_path / "outside"
    outside.mkdir()
    (archive, members), *_ = SMALL[name].archives.items()
    content = tar_bytes(tmp_path / "made", members, *EVIL[evil](outside))
    if archive.endswith(".zip"):
        with zipfile.ZipFile(site / archive, "w") as zipped:
            zipped.writestr("caltech-101/101_ObjectCategories.tar.gz", content)
    else:
        (site / archive).write_bytes(content)
    assert f"cannot download the data set {name}" in _refused(name, tmp_path / "data")
    assert not list(tmp_path.rglob("escaped"))
    assert os.listdir(outside) == []


@pytest.mark.parametrize("name", ["dtd", "cifar10"])
@pytest.mark.usefixtures("confined_by")
def test_an_absolute_member_stays_inside(
    name: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(name, tmp_path, monkeypatch)
    (archive, members), *_ = SMALL[name].archives.items()
    (site / archive).write_bytes(tar_bytes(tmp_path / "made", members, _member(str(tmp_path / "escaped"))))
    assert load_source(name, tmp_path / "data", download=True).ids == list(SMALL[name].samples)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("member", ["../../escaped", "/escaped", "tiny-imagenet-200/../../../escaped", "..\\escaped"])
@pytest.mark.parametrize("name", ["tiny-imagenet", "eurosat", "caltech101"])
def test_a_zip_that_points_outside_is_refused(
    name: str, member: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(name, tmp_path, monkeypatch)
    (archive,) = SMALL[name].archives
    with zipfile.ZipFile(site / archive, "a") as zipped:
        zipped.writestr(member, "x")
    message = _refused(name, tmp_path / "data")
    assert f"{archive} holds {member!r}, which points outside its folder" in message
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.usefixtures("confined_by")
def test_tars_are_confined_for_an_older_torchvision(tmp_path: Path) -> None:
    """One that calls extractall without a filter; and the class is what it was afterwards."""
    content = tar_bytes(tmp_path, [], _member("../escaped"))
    (tmp_path / "inner").mkdir()
    before = dict(vars(tarfile.TarFile))
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as tar,
        pytest.raises(tarfile.TarError),
        confined_tar(),
    ):
        tar.extractall(tmp_path / "inner")
    assert not (tmp_path / "escaped").exists()
    assert dict(vars(tarfile.TarFile)) == before


@pytest.mark.parametrize("evil", [("a", "..", "a/x"), ("d/l", "../..", "x"), ("l", "/", "x"), ("l", "d", "l/x")])
def test_links_that_lead_elsewhere(evil: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, for a Python that has no filter: a link upwards, to the root, or followed by a path."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    name, target, following = evil
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, target
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo(following))
    content.seek(0)
    (tmp_path / "inner").mkdir()
    with tarfile.open(fileobj=content) as tar, confined_tar(), pytest.raises(tarfile.TarError, match="outside"):
        tar.extractall(tmp_path / "inner")
    assert list((tmp_path / "inner").iterdir()) == []


def test_a_download_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / "mine").write_text("x")
    with pytest.raises(FastdlpError, match="incomplete or damaged"):
        load_source("dtd", tmp_path, download=True)
    assert (tmp_path / "dtd" / "mine").read_text() == "x"


# From a server on this machine.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of tmp_path/site; torchvision's addresses point there, with the true sums of what lies there."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    for name in (*SERVED, "cifar100"):
        _publish(name, tmp_path, monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "site")) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{http.server_port}/"
        _point_torchvision_at(monkeypatch, url, tmp_path / "site")
        yield url
        http.shutdown()
        thread.join()


def _point_torchvision_at(monkeypatch: pytest.MonkeyPatch, url: str, site: Path) -> None:
    pets = tuple((url + name, md5(site / name)) for name in ("images.tar.gz", "annotations.tar.gz"))
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", pets)
    files = {key: (name, md5(site / name)) for key, (name, _) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", url)
    monkeypatch.setattr(datasets.FGVCAircraft, "_URL", url + "fgvc-aircraft-2013b.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_URL", url + "dtd-r1.0.1.tar.gz")
    monkeypatch.setattr(datasets.DTD, "_MD5", md5(site / "dtd-r1.0.1.tar.gz"))


@pytest.mark.parametrize("name", SERVED)
def test_a_download_over_http(name: str, server: str, tmp_path: Path) -> None:
    source = load_source(name, tmp_path / "data", download=True)
    assert source.ids == list(SMALL[name].samples)
    assert os.listdir(tmp_path / "data") == [SMALL[name].folder]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", SERVED)
def test_a_cut_off_download_leaves_nothing(name: str, server: str, tmp_path: Path) -> None:
    """The sums no longer fit, or, for aircraft, which has none, the archive is cut off."""
    for file in (tmp_path / "site").glob("*gz"):
        file.write_bytes(file.read_bytes()[:-200])
    message = _refused(name, tmp_path / "data")
    assert f"cannot download the data set {name}" in message
    assert "pass --data-dir" in message


def test_an_archive_with_another_sum_is_not_unpacked(server: str, tmp_path: Path) -> None:
    archive = "cifar-100-binary.tar.gz"
    fetch_archive(server + archive, md5(tmp_path / "site" / archive), tmp_path / "good")
    assert os.listdir(tmp_path / "good") == ["cifar-100-binary"]
    with pytest.raises(RuntimeError, match="corrupted"):
        fetch_archive(server + archive, "0" * 32, tmp_path / "bad")
    assert os.listdir(tmp_path / "bad") == [archive]


@pytest.mark.parametrize("name", FETCHED)
def test_a_download_without_a_network_names_the_cause(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name is resolved and no address reached, so every set's own address is tried and none is called."""

    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    message = _refused(name, tmp_path / "data")
    assert f"cannot download the data set {name}" in message
    assert "Temporary failure in name resolution" in message
    assert "try again" in message
    assert socket.getdefaulttimeout() is None
