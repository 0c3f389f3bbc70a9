"""Pre-training of glyph-clip: the renderer, a few steps, the files, and the weights that ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdlp import pretrain
from fastdlp.clip.load import Clip, load_clip, model_config
from fastdlp.data.sources import digits

ASSETS = Path(pretrain.__file__).parent / "assets"
TINY = pretrain.Settings(text_steps=8, steps=10, glyphs=64, batch=32)


@pytest.fixture(scope="module")
def atlas() -> torch.Tensor:
    return pretrain.render_atlas(fonts=pretrain.FONTS[:2], strokes=(0, 1))


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices, and the machine may be busy
    yield
    torch.set_num_threads(before)


def load(folder: Path) -> tuple[Clip, dict]:
    about = json.loads((folder / "glyph-clip.json").read_text())
    model = open_clip.CLIP(**about["model_cfg"])
    state = load_file(folder / "glyph-clip.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    model.load_state_dict(state, strict=True)
    return load_clip("glyph-clip", str(folder / "glyph-clip.safetensors")), about


def test_atlas_has_a_different_drawing_for_every_character(atlas: torch.Tensor) -> None:
    assert atlas.shape == (62, 4, 64, 64)
    assert (atlas.amax((2, 3)) > 200).all()
    assert len(atlas[:, 0].flatten(1).unique(dim=0)) == 62


def test_glyphs_are_inked_distinct_and_the_same_again(atlas: torch.Tensor) -> None:
    scans, labels = pretrain.make_glyphs(atlas, 500, seed=3)
    again, labels_again = pretrain.make_glyphs(atlas, 500, seed=3)
    other, _ = pretrain.make_glyphs(atlas, 500, seed=4)
    assert scans.shape == (500, 8, 8)
    assert scans.dtype == torch.uint8
    assert (scans.flatten(1).amax(1) > 127).all()
    assert len(scans.flatten(1).unique(dim=0)) == 500
    assert torch.equal(scans, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(scans, other)


def test_scans_have_the_grey_levels_of_load_digits(atlas: torch.Tensor) -> None:
    levels = {round(v * 255 / 16) for v in range(17)}
    assert set(pretrain.make_glyphs(atlas, 200, seed=0)[0].unique().tolist()) <= levels
    assert set(np.unique(digits().images).tolist()) == levels


def test_preprocess_is_the_resize_of_pil(atlas: torch.Tensor) -> None:
    scans, _ = pretrain.make_glyphs(atlas, 20, seed=0)
    transform = load_clip("glyph-clip").transform
    for scan, mine in zip(scans, pretrain.preprocess(scans, transform)):
        image = Image.fromarray(scan.numpy()).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        gray = mine.permute(1, 2, 0).numpy() * np.array(transform.std) + np.array(transform.mean)
        assert np.abs(gray * 255 - np.asarray(image)).max() < 1.01


def test_captions_name_the_class_and_fit_the_context() -> None:
    assert "a photo of the digit three" in pretrain.captions("3")
    assert "a photo of the letter b" in pretrain.captions("b")
    assert "a photo of the capital letter b" in pretrain.captions("B")
    every = [caption for character in pretrain.CHARACTERS for caption in pretrain.captions(character)]
    assert len(set(every)) == len(every)
    assert max(map(len, every)) <= model_config("glyph-clip")["text_cfg"]["context_length"] - 2


def test_contrastive_loss_takes_images_of_one_class_as_positives() -> None:
    right = 100 * torch.eye(3)[[0, 0, 2]]
    labels = torch.tensor([0, 0, 2])
    # Text to image, the two images of class 0 share the probability: log 2 for one class of the two present.
    expected = torch.tensor(2.0).log() / 2 / 2
    torch.testing.assert_close(pretrain.contrastive_loss(right, labels, 0.0), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_a_short_run_learns_and_writes_files_that_load(
    tmp_path: Path, atlas: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "render_atlas", lambda: atlas)
    clip = load_clip("glyph-clip", "none")
    pretrain.read_captions(clip, TINY)
    scans, labels = pretrain.make_glyphs(atlas, TINY.glyphs, seed=0)
    losses = [loss for _, loss in pretrain.train(clip, scans, labels, TINY)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5

    record = pretrain.pretrain(tmp_path, replace(TINY, text_steps=1, steps=1))
    loaded, about = load(tmp_path)
    assert about["trained_with"] == record
    assert record["text_steps"] == record["steps"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["glyph-clip.json", "glyph-clip.safetensors"]
    assert pretrain.digits_zero_shot(loaded) == pytest.approx(record["digits_zero_shot"], abs=1e-3)


@pytest.mark.usefixtures("threads")
def test_the_weights_that_ship_read_handwriting() -> None:
    clip, about = load(ASSETS)
    assert sum((ASSETS / f"glyph-clip.{suffix}").stat().st_size for suffix in ("json", "safetensors")) <= 10e6
    assert {k: about["trained_with"][k] for k in vars(pretrain.Settings())} == vars(pretrain.Settings())
    accuracy = pretrain.digits_zero_shot(clip)
    assert accuracy > 0.1 + 0.5  # chance is one in ten
    assert accuracy == pytest.approx(about["trained_with"]["digits_zero_shot"], abs=0.01)
