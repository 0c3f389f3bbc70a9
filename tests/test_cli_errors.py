"""Bad input: exit code 2, one line on stderr that says what is wrong, and nothing written, lost or executed."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastdlp
from fastdlp.adapters.serialization import load_tensors, save_tensors
from fastdlp.run.train import Callbacks, Stopped

Refused = Callable[..., str]


def _tree(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


class Bomb:
    """Unpickling it makes the file `executed`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all kinds of unusable things in it."""
    for folder in ("empty", "noclass", "noimage/cat", "broken/cat", "broken/dog", "odd", "odder"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "noclass/a.png").touch()
    (tmp_path / "noimage/cat/notes.txt").touch()
    for kind, shade in (("cat", 40), ("dog", 200)):
        for i in range(8):
            Image.new("RGB", (9, 9), (shade, 10 * i, 0)).save(tmp_path / "broken" / kind / f"{i}.png")
    (tmp_path / "broken/cat/3.png").write_bytes(b"no image")
    (tmp_path / "odd/open_clip_config.json").write_text('{"model_cfg": {}}')
    (tmp_path / "odder/open_clip_config.json").write_text('{"model_cfg": []}')
    (tmp_path / "text.safetensors").write_text("this is no safetensors file")
    (tmp_path / "weights.doc").write_text("x")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"state_dict": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    _partition(tmp_path / "unknown.json", {"train": ["digits/99999"], "test": ["digits/00001"]})
    _partition(tmp_path / "pets.json", {"train": ["Abyssinian_1.jpg"], "test": []}, dataset="pets")
    _partition(tmp_path / "twice.json", {"train": ["digits/00001", "digits/00002"], "test": ["digits/00001"]})
    _partition(tmp_path / "half.json", {"train": ["digits/00001"]})
    _partition(tmp_path / "untrained.json", {"train": [], "test": ["digits/00001"]})
    _partition(tmp_path / "untested.json", {"train": ["digits/00001"], "test": []})
    (tmp_path / "nojson.json").write_text("{'clients': ")
    (tmp_path / "alien.json").write_text('{"clients": {}}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _partition(path: Path, member: dict[str, list[str]], **more: object) -> None:
    path.write_text(json.dumps({"format": "fastdlp-partition", "version": 1, "clients": {"0": member}} | more))


@pytest.fixture
def assert_refused(place: Path, cli: Any) -> Refused:
    """Call a command that must fail; asserts all that the promise says and returns the message."""

    def call(command: str, *words: str, changes: bool = False) -> str:
        before = _tree(place)
        code, out, err = cli(*shlex.split(command))
        assert (code, out) == (2, ""), err
        (line,) = [line for line in err.splitlines() if line.strip()]
        assert line.startswith("fastdlp: ")
        assert [word for word in words if word not in line] == [], line
        if not changes:
            assert _tree(place) == before
        return line

    return call


OPTIONS = {
    "--method nope": ["--method", "'nope'", "feddlp, flora, feddat, combined"],
    "--encoder nope": ["--encoder", "'nope'", "image, text"],
    "--protocol nope": ["--protocol", "paper, reference"],
    "--teacher nope": ["--teacher", "fresh, pre-update"],
    "--precision nope": ["--precision", "fp32, bf16"],
    "--partition nope": ["--partition", "'nope'", "dirichlet, iid, pathological"],
    "--dataset nope": ["'nope'", "digits, pets, flowers, aircraft, dtd", "folder:PATH"],
    "--device nope": ["--device", "auto, cpu, cuda, cuda:N"],
    "--device cuda:nope": ["--device", "cuda:nope"],
    "--device cuda": ["--device cuda", "0 CUDA devices", "--device cpu"],
    "--device cuda:7": ["--device cuda:7", "--device cpu"],
    "--beta 0": ["--beta is 0.0", "greater than 0"],
    "--beta -1": ["--beta is -1.0", "greater than 0"],
    "--beta nan": ["--beta is nan", "finite"],
    "--beta inf": ["--beta is inf", "finite"],
    "--beta much": ["--beta", "number"],
    "--clients 0": ["--clients is 0", "at least 1"],
    "--clients 1798": ["1798 clients for 1797 samples"],
    "--rank-local 0": ["--rank-local is 0", "at least 1"],
    "--rank-global 0": ["--rank-global is 0", "at least 1"],
    "--rank-local 1000000000": ["--rank-local", "memory"],
    "--batch-size 0": ["--batch-size is 0", "at least 1"],
    "--rounds 0": ["--rounds is 0", "at least 1"],
    "--rounds 1.5": ["--rounds", "integer"],
    "--lr 0": ["--lr is 0.0", "greater than 0"],
    "--lr 1e39": ["--lr is 1e+39"],
    "--lr nan": ["--lr is nan", "finite"],
    "--gate-lr nan": ["--gate-lr is nan", "finite"],
    "--xi -1": ["--xi is -1.0", "0 or greater"],
    "--seed -1": ["--seed is -1", "0 or greater"],
    "--seed 99999999999999999999": ["--seed"],
    "--partition-seed -1": ["--partition-seed is -1"],
    "--test-fraction 1": ["--test-fraction is 1.0", "between 0 and 1"],
    "--test-fraction nan": ["--test-fraction is nan"],
    "--micro-batch 0": ["--micro-batch is 0", "at least 1"],
    "--checkpoint-every 0": ["--checkpoint-every is 0", "at least 1"],
    "--template word": ["--template 'word'", "{}"],
    "--template {}{}": ["--template '{}{}'", "one {}"],
    "--no-such 1": ["--no-such", "--help"],
    "--method": ["--method", "requires an argument"],
    "extra": ["extra", "--help"],
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, assert_refused: Refused) -> None:
    assert_refused(f"train --out run {options}", *OPTIONS[options])


MODELS = {
    "nope": ["unknown model 'nope'", "ViT-B-32-quickgelu", "--models"],
    "RN50": ["ResNet", "supported are", "ViT-B-32-quickgelu"],
    "convnext_base": ["timm", "supported are", "ViT-B-32-quickgelu"],
    "ViT-B-16-SigLIP": ["timm", "supported are"],
    "xlm-roberta-base-ViT-B-32": ["Hugging Face text tower", "supported are"],
    "coca_ViT-B-32": ["CoCa", "supported are"],
    "local-dir:missing": ["missing/open_clip_config.json", "No such file"],
    "local-dir:odd": ["odd/open_clip_config.json"],
    "local-dir:odder": ["odder/open_clip_config.json"],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("command", ["train --out run", "info"])
def test_models(command: str, model: str, assert_refused: Refused) -> None:
    assert_refused(f"{command} --model {model}", *MODELS[model])


DATA = {
    "folder:": ["folder:PATH"],
    "folder:missing": ["missing is not a folder"],
    "folder:empty": ["empty holds no class folders"],
    "folder:noclass": ["noclass holds no class folders", "a folder of its own"],
    "folder:noimage": ["noimage/cat holds no images"],
    "folder:broken": ["1 of the 16", "cat/3.png", "--bad-images skip"],
    "pets": ["pets", "oxford-iiit-pet", "--data-dir", "--download"],
    "pets --data-dir missing": ["missing does not hold the data set pets", "--download"],
}


@pytest.mark.parametrize("dataset", DATA)
def test_data(dataset: str, assert_refused: Refused) -> None:
    assert_refused(f"train --out run --dataset {dataset}", *DATA[dataset])


def test_bad_images_can_be_skipped(place: Path, cli: Any) -> None:
    options = "--dataset folder:broken --bad-images skip --clients 2 --partition iid --rounds 1 --batch-size 4"
    code, out, _ = cli("train", *options.split(), "--out", "run")
    assert code == 0
    assert "1 images cannot be read and were skipped: cat/3.png: not an image file" in out
    summary = json.loads((place / "run/summary.json").read_text())
    assert summary["bad_images"] == ["cat/3.png: not an image file"]
    assert "cat/3.png" not in (place / "run/partition.json").read_text()
    assert sum(c["n_train"] + c["n_test"] for c in summary["per_client"]) == 15


WEIGHTS = {
    "missing.pt": ["'missing.pt'", "neither a file nor a tag"],
    "some_tag": ["'some_tag'", "neither a file nor a tag"],
    "weights.doc": ["weights.doc", ".safetensors"],
    "text.safetensors": ["text.safetensors", "not a safetensors file"],
    "other.safetensors": ["other.safetensors", "of another model"],
    "zip.pt": ["zip.pt", "will not be unpickled", "safetensors"],
    "plain.pt": ["plain.pt", "will not be unpickled", "safetensors"],
    "empty": ["empty"],
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("model", ["glyph-clip", "ViT-B-32"])
def test_weights(
    model: str, weights: str, place: Path, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model == "ViT-B-32":  # as open_clip loads it, but small: 150 million parameters take a while to draw
        import open_clip
        from open_clip import factory

        small = open_clip.get_model_config(model)
        small["vision_cfg"] |= {"width": 64, "layers": 1}
        small["text_cfg"] |= {"width": 64, "heads": 1, "layers": 1}
        monkeypatch.setitem(factory._MODEL_CONFIGS, model, small)
    assert_refused(f"train --out run --model {model} --pretrained {weights}", *WEIGHTS[weights])
    assert not (place / "executed").exists()


def test_the_bomb_works(place: Path) -> None:
    """Or the test above would prove nothing."""
    pickle.load(io.BytesIO((place / "plain.pt").read_bytes()))
    assert (place / "executed").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("ViT-B-32-quickgelu", ["openai", "cannot be downloaded", "--pretrained FILE"]),
        ("hf-hub:nobody/nothing", ["hf-hub:nobody/nothing", "offline?"]),
    ],
)
def test_offline(
    model: str, words: list[str], assert_refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported within seconds, and not after a minute of retries."""
    import huggingface_hub.constants as hub

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(place.parent / "hub"))
    start = time.monotonic()
    assert_refused(f"train --out run --model {model}", *words)
    assert time.monotonic() - start < 15


PARTITIONS = {
    "unknown.json": ["digits/99999", "does not have"],
    "pets.json": ["Abyssinian_1.jpg", "its data set is 'pets'"],
    "twice.json": ["digits/00001", "more than once"],
    "half.json": ["client '0'", "test"],
    "untrained.json": ["no client has a training sample"],
    "untested.json": ["no client", "test sample"],
    "nojson.json": ["nojson.json", "not JSON"],
    "alien.json": ["alien.json", "not a partition file"],
}


@pytest.mark.parametrize("file", PARTITIONS)
def test_partition_files(file: str, assert_refused: Refused) -> None:
    assert_refused(f"train --out run --partition {file}", *PARTITIONS[file])


OTHERS = {
    "nope": ["'nope'", "--help"],
    "info --method nope": ["--method", "feddlp, flora, feddat, combined"],
    "info --encoder nope": ["--encoder", "image, text"],
    "info --rank-local 0": ["--rank-local is 0"],
    "info --rank-global 1000000000": ["--rank-global", "memory"],
    "data nope": ["'nope'"],
    "data show --dataset nope": ["'nope'", "folder:PATH"],
    "data show --dataset folder:empty": ["no class folders"],
    "data show --clients 0": ["--clients is 0"],
    "data show --beta nan": ["--beta is nan"],
    "data show --partition twice.json": ["more than once"],
    "data show --partition pathological --classes-per-client 11": ["11 classes per client, of 10"],
    "data show --picture figure.doc": ["figure.doc", ".png, .svg, .pdf"],
    "data show --picture weights.doc/figure.png": ["weights.doc/figure.png", "cannot write"],
    "evaluate": ["run", "--help"],
    "evaluate missing": ["missing does not exist"],
    "evaluate empty": ["empty is not a run folder"],
    "train --resume missing": ["missing does not exist", "name a folder"],
    "train --resume empty": ["empty is not a run folder"],
    "train --resume missing --overwrite": ["--resume", "--overwrite", "exclude"],
    "train --resume missing --out run": ["--resume", "--out"],
    "train --out noclass": ["noclass", "not a run folder", "--out"],
    "train --out noclass --overwrite": ["noclass", "not a run folder", "--out"],
    "train --out weights.doc": ["weights.doc", "not a run folder"],
    "train --out weights.doc/run": ["weights.doc", "--out"],
    "train --out /proc/run": ["/proc", "--out"],
    f"train --out {'long' * 80}": ["File name too long", "--out"],
    "bench round --precision fp8": ["--precision", "'fp8'", "fp32, bf16"],
    "bench round --only adapters": ["--only", "'adapters'", "peft, autocast, strongest"],
    "bench round --encoder text --only peft": ["--only", "'peft'", "uncached, fastdlp"],
    "bench round --encoder both": ["--encoder", "'both'", "image, text"],
    "bench round --only autocast --precision fp32": ["no variant is left"],
    "bench round --repeats 1": ["--repeats"],
}


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands(command: str, assert_refused: Refused) -> None:
    assert_refused(command, *OTHERS[command])


@pytest.mark.parametrize("command", ["", "data", "bench"])
def test_no_command(command: str, place: Path, cli: Any) -> None:
    """Help comes on stdout; the line on stderr still says what is wrong."""
    code, out, err = cli(*command.split())
    assert code == 2
    assert "Usage:" in out
    assert "command" in err
    assert err.count("\n") == 1


# -- runs that exist ----------------------------------------------------------------------------------------


def _config(few: Path, out: Path, **options: Any) -> fastdlp.TrainConfig:
    return fastdlp.TrainConfig(**({"partition": str(few), "batch_size": 4, "rounds": 2, "out": str(out)} | options))


@pytest.fixture(scope="module")
def runs(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `done` (2 rounds), `seed1` (the same with another seed) and `half` (2 of 3 rounds)."""
    root = tmp_path_factory.mktemp("runs")
    fastdlp.train(_config(few, root / "done"))
    fastdlp.train(_config(few, root / "seed1", seed=1))
    asked: list[int] = []
    with pytest.raises(Stopped):
        fastdlp.train(
            _config(few, root / "half", rounds=3),
            callbacks=Callbacks(should_stop=lambda: bool(asked.append(1) or len(asked) == 2)),
        )
    fastdlp.train(_config(few, root / "whole", rounds=3))
    return root


@pytest.fixture
def copies(runs: Path, place: Path) -> Path:
    for run in ("done", "half"):
        shutil.copytree(runs / run, place / run)
    return place


RUNS = {
    "train --out done": ["done holds a run", "--resume done", "--overwrite"],
    "train --out half": ["half holds a run", "--resume half"],
    "train --resume half --lr 0.5": ["--lr 0.001 (now 0.5)"],
    "train --resume half --method flora": ["--method feddlp (now flora)"],
    "train --resume half --method nope": ["nope"],
    "train --resume half --seed 3": ["--seed 0 (now 3)"],
    "train --resume half --rounds 0": ["--rounds is 0"],
    "train --resume half --rounds 1": ["has finished 2 rounds"],
    "train --resume half --checkpoint-every 0": ["--checkpoint-every is 0"],
    "train --resume done --lr 0.5": ["--lr 0.001 (now 0.5)"],
    "train --resume half --overwrite": ["exclude"],
    "train --resume half --out other": ["--out"],
    "train --out half --overwrite --lr 0": ["--lr is 0.0"],
    "train --out half --overwrite --dataset folder:broken": ["cat/3.png"],
    "train --out half --overwrite --device cuda": ["--device cpu"],
    "evaluate half": ["half has not ended", "--resume half"],
    "evaluate done --device cuda": ["--device cpu"],
    "evaluate done --device nope": ["--device"],
}


@pytest.mark.parametrize("command", RUNS)
def test_runs(command: str, copies: Path, assert_refused: Refused) -> None:
    assert_refused(command, *RUNS[command])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff\xfe garbage \x00" * 100)


def _no_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": "fast"'))


def _unknown_option(path: Path) -> None:
    path.write_text(path.read_text().replace('"lr":', '"speed":'))


def _without_line(number: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:number] + lines[number + 1 :]))

    return damage


def _garbled_line(path: Path) -> None:
    """The first line; the good one after it must not be thrown away."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["{" + lines[0], *lines[1:]]))


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "truncated checkpoint": ("checkpoint.safetensors", _truncate, ["checkpoint.safetensors", "damaged"]),
    "garbage checkpoint": ("checkpoint.safetensors", _garbage, ["checkpoint.safetensors", "damaged"]),
    "empty checkpoint": ("checkpoint.safetensors", _text(""), ["checkpoint.safetensors", "damaged"]),
    "cut config": ("config.json", _text('{"method": "fed'), ["config.json"]),
    "garbage config": ("config.json", _garbage, ["config.json"]),
    "config that is a list": ("config.json", _text("[]"), ["config.json"]),
    "config with a word for a number": ("config.json", _no_number, ["lr", "fast"]),
    "config of another version": ("config.json", _unknown_option, ["config.json", "speed", "version"]),
    "metrics without line 1": ("metrics.jsonl", _without_line(0), ["metrics.jsonl", "rounds 1 to 2"]),
    "metrics without line 2": ("metrics.jsonl", _without_line(1), ["metrics.jsonl", "rounds 1 to 2"]),
    "garbled metrics": ("metrics.jsonl", _garbled_line, ["metrics.jsonl", "rounds 1 to 2"]),
    "garbage metrics": ("metrics.jsonl", _garbage, ["metrics.jsonl"]),
    "other metrics": ("metrics.jsonl", _text('{"a": 1}\n[]\n'), ["metrics.jsonl"]),
    "missing metrics": ("metrics.jsonl", Path.unlink, ["metrics.jsonl", "rounds 1 to 2"]),
    "cut partition": ("partition.json", _text("{"), ["partition.json", "not JSON"]),
    "missing partition": ("partition.json", Path.unlink, ["partition.json"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_run(what: str, copies: Path, assert_refused: Refused) -> None:
    file, damage, words = DAMAGE[what]
    damage(copies / "half" / file)
    assert_refused("train --resume half", *words)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "7"])
def test_damaged_summary(text: str, copies: Path, assert_refused: Refused) -> None:
    (copies / "done/summary.json").write_text(text)
    assert_refused("train --resume done", "summary")


def test_checkpoint_of_another_config(runs: Path, copies: Path, assert_refused: Refused) -> None:
    shutil.copy(runs / "seed1/checkpoint.safetensors", copies / "half/checkpoint.safetensors")
    assert_refused("train --resume half", "checkpoint.safetensors", "belongs to another run", "config")


def test_run_without_its_checkpoint(copies: Path, assert_refused: Refused) -> None:
    """Two rounds are recorded: to start again silently would throw them away."""
    (copies / "half/checkpoint.safetensors").unlink()
    assert_refused("train --resume half", "checkpoint.safetensors", "missing")


ADAPTERS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (_truncate, ["client-01.safetensors", "damaged"]),
    "garbage": (_garbage, ["client-01.safetensors", "damaged"]),
    "missing": (Path.unlink, ["client-01.safetensors", "missing"]),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_damaged_adapters(what: str, copies: Path, assert_refused: Refused) -> None:
    damage, words = ADAPTERS[what]
    damage(copies / "done/adapters/client-01.safetensors")
    assert_refused("evaluate done", *words)


def test_adapters_of_other_weights_shape_and_names(copies: Path, assert_refused: Refused) -> None:
    path = copies / "done/adapters/client-01.safetensors"
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, about | {"weights": "0" * 64})
    assert_refused("evaluate done", "client-01.safetensors", "other weights than glyph-clip")
    save_tensors(path, tensors | {"local/proj/A": torch.zeros(5, 128)}, about)
    assert_refused("evaluate done", "client-01.safetensors", "proj/A is (5, 128)")
    save_tensors(path, {n: t for n, t in tensors.items() if n != "local/proj/gate"}, about)
    assert_refused("evaluate done", "client-01.safetensors", "another shape", "proj/gate")
    save_tensors(path, {n: t for n, t in tensors.items() if n.startswith("local/")}, about)
    assert_refused("evaluate done", "client-01.safetensors", "another shape")
    save_tensors(path, tensors | {"third/proj/A": torch.zeros(2, 128)}, about)
    assert_refused("evaluate done", "client-01.safetensors", "['global', 'local', 'third']", "['global', 'local']")


# -- losses that are not finite ------------------------------------------------------------------------------


def test_loss_that_is_not_finite(few: Path, place: Path, assert_refused: Refused, cli: Any) -> None:
    """The checkpoint before it stays, and a resumed run fails in the same words."""
    command = f"train --partition {few} --batch-size 4 --rounds 3 --quiet --lr 1e30 --out run"
    message = assert_refused(command, "client", "round 1, step 0", "lower --lr", "last good checkpoint", changes=True)
    tensors, about = load_tensors(place / "run/checkpoint.safetensors")
    assert about["round"] == "0"
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert assert_refused("train --resume run --quiet", changes=True) == message
    again, about_again = load_tensors(place / "run/checkpoint.safetensors")
    assert about_again == about
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_weights_that_are_not_finite(few: Path, place: Path, assert_refused: Refused) -> None:
    """The only step of a round has a finite loss and ruins the adapters: that round must not be kept."""
    command = f"train --method local --partition {few} --batch-size 64 --rounds 1 --quiet --out run"
    command += " --lr 1e38 --weight-decay 10"
    assert_refused(command, "client", "round 1", "not finite", "lower --lr", changes=True)
    tensors, about = load_tensors(place / "run/checkpoint.safetensors")
    assert about["round"] == "0"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# -- disks that refuse ----------------------------------------------------------------------------------------


def test_read_only_at_the_start(
    place: Path, assert_refused: Refused, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        assert_refused(f"train --partition {few} --out run", "Read-only file system", "--out")


def _fail_at(patch: pytest.MonkeyPatch, function: str, number: int) -> list[int]:
    """From its call of this number on, the function of os says that the disk is full. Returns the calls seen."""
    real, calls = getattr(os, function), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    patch.setattr(os, function, full)
    return calls


@pytest.fixture(scope="module")
def writes(few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Calls of each function of os in a run of three rounds."""
    with pytest.MonkeyPatch.context() as patch:
        calls = {function: _fail_at(patch, function, 10**9) for function in ("fsync", "replace")}
        fastdlp.train(_config(few, tmp_path_factory.mktemp("counted") / "run", rounds=3))
    return {function: len(made) for function, made in calls.items()}


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("part", range(6))
def test_disk_full_at_any_write(
    function: str,
    part: int,
    few: Path,
    runs: Path,
    writes: dict[str, int],
    place: Path,
    assert_refused: Refused,
    cli: Any,
    same_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line; whatever folder there is holds a whole checkpoint and goes on to the same bits."""
    command = f"train --partition {few} --batch-size 4 --rounds 3 --quiet --out"
    most = writes[function] - (function == "fsync")  # the last one makes a finished rename durable, and may fail
    number = 1 + part * (most - 1) // 5
    with monkeypatch.context() as patch:
        _fail_at(patch, function, number)
        assert_refused(f"{command} run", "No space left on device", changes=True)
    assert list(place.rglob(".*")) == []
    if not (place / "run").exists():
        assert number <= 4
        return
    if (place / "run/checkpoint.safetensors").exists():
        load_tensors(place / "run/checkpoint.safetensors")
    assert cli("train", "--resume", "run", "--quiet") == (0, "", "")
    same_run(place / "run", runs / "whole")


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system with 10 MB free; skipped where one may not be mounted."""
    point = tmp_path_factory.mktemp("disk")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", point], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("no right to mount a file system")
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
@pytest.mark.parametrize("free_kib", [1, 1000, 3000])
def test_a_truly_full_disk(
    free_kib: int, small_disk: Path, runs: Path, few: Path, assert_refused: Refused, cli: Any, same_run: Any
) -> None:
    """A checkpoint takes 2 MB, and a second one beside it while it is written."""
    ballast, run = small_disk / "ballast", small_disk / "run"
    size = 10 * 1024 - free_kib
    ballast.write_bytes(b"x" * (size * 1024))
    command = f"train --partition {few} --batch-size 4 --rounds 3 --quiet"
    assert_refused(f"{command} --out {run}", "No space left on device", str(small_disk))
    assert list(small_disk.rglob(".*")) == []
    ballast.unlink()
    if run.exists():
        command = f"train --quiet --resume {run}"
    else:
        command += f" --out {run}"
    assert cli(*command.split()) == (0, "", "")
    same_run(run, runs / "whole")


@pytest.mark.parametrize("number", [1, 2])
def test_overwrite_keeps_the_old_run_until_the_new_one_stands(
    number: int, few: Path, copies: Path, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses once while the new folder takes the old one's place."""
    with monkeypatch.context() as patch:
        real, folders = os.replace, []

        def full(source: Any, target: Any) -> None:
            folders.extend([source] if Path(source).is_dir() else [])
            if Path(source).is_dir() and len(folders) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        patch.setattr(os, "replace", full)
        assert_refused(f"train --partition {few} --out done --overwrite --quiet", "No space left on device")


@pytest.mark.parametrize("options", ["", "--overwrite"])
def test_the_working_directory_is_no_run_folder(
    options: str, copies: Path, assert_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced under the feet of the caller, whose shell then stands nowhere."""
    monkeypatch.chdir(copies / ("half" if options else "empty"))
    assert_refused(f"train --out . {options}", "working directory", "--out")


def test_overwrite_through_a_link(few: Path, copies: Path, runs: Path, cli: Any, same_run: Any) -> None:
    (copies / "link").symlink_to("half")
    command = f"train --partition {few} --batch-size 4 --rounds 3 --quiet --overwrite --out link"
    assert cli(*command.split()) == (0, "", "")
    same_run(copies / "half", runs / "whole")
    assert not [p.name for p in copies.iterdir() if p.name.startswith(".")]


# -- true processes -------------------------------------------------------------------------------------------


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastdlp", *arguments], capture_output=True, text=True, check=False)


def test_a_wrong_option_is_refused_before_torch_is_loaded(place: Path) -> None:
    code = "import sys; sys.argv = ['fastdlp', 'train', '--beta', '0']\n"
    code += "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
    code += "from fastdlp.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "fastdlp: --beta is 0.0: it must be a finite number greater than 0\n"


def test_the_process_says_one_line(place: Path) -> None:
    before = _tree(place)
    done = _run("train", "--pretrained", "plain.pt", "--out", "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "will not be unpickled" in done.stderr
    assert _tree(place) == before


def test_options_that_a_partition_file_has_settled(few: Path, cli: Any, tmp_path: Path) -> None:
    code, out, err = cli("train", "--partition", few, "--beta", 0.7, "--clients", 9, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "leave out --clients, --beta" in err
    assert not (tmp_path / "run").exists()
