"""Pre-train the demonstration model `glyph-clip`, a small CLIP, on printed glyphs.

    python -m fastdlp.pretrain --out DIR        a few minutes on two CPU cores, no network

The data are the digits and letters of the fonts in matplotlib, so they are reproducible. Federated fine-tuning then
adapts the model to scikit-learn's `load_digits`, handwriting of 8x8 pixels. No image of that data set is trained on;
the augmentation's ranges were chosen to resemble it, and the zero-shot accuracy is measured on it at the end.

    font file -> glyph [64, 64]          `render_atlas`: each character, each font, three stroke widths
              -> warped, [32, 32] bits   `handwrite`: rotated, sheared, bent, strokes thickened or thinned
              -> [8, 8] uint8            `handwrite`: 4x4 blocks counted, as in load_digits
              -> [32, 32] -> [n, 3, 32, 32] float32      `preprocess`: the model's transform
"""

from __future__ import annotations

import argparse
import json
import math
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdlp.clip.load import Clip, description, load_clip
from fastdlp.config import EMBEDDED_MODEL
from fastdlp.data.sources import DIGIT_NAMES, DIGIT_TEMPLATE, digits
from fastdlp.data.transform import Transform
from fastdlp.files import write_atomic

CANVAS, BITMAP, SCAN = 64, 32, 8  # sides of a rendered glyph, of the warped one and of the image

# No bold fonts: they are not legible at 8 pixels.
FONTS = [
    "DejaVuSans.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
]
CHARACTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase  # class c is CHARACTERS[c]
TEMPLATES = ["a photo of the {}", "an image of the {}", "a picture of the {}", "a drawing of the {}", "the {}"]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults are those of the weights in the package."""

    seed: int = 0
    text_steps: int = 60
    steps: int = 1600
    glyphs: int = 200_000
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05


# -- data -----------------------------------------------------------------------------------------------------------


def captions(character: str) -> list[str]:
    """Every caption of one class, e.g. `a photo of the digit three` and `the capital letter b`."""
    if character.isdigit():
        nouns = [f"{noun} {DIGIT_NAMES[int(character)]}" for noun in ("digit", "number")]
    else:
        nouns = [f"{'capital ' * character.isupper()}letter {character.lower()}"]
    return [template.format(noun) for template in TEMPLATES for noun in nouns]


def render_atlas(fonts: list[str] = FONTS, strokes: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """Draw each character once per font and stroke width: [characters, fonts * strokes, 64, 64] uint8."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [ImageFont.truetype(folder / font, size=44) for font in fonts]

    def draw(character: str, face: Any, stroke: int) -> np.ndarray:
        canvas = Image.new("L", (CANVAS, CANVAS))
        center = (CANVAS / 2, CANVAS / 2)
        pen = ImageDraw.Draw(canvas)
        left, top, right, bottom = pen.textbbox(center, character, font=face, anchor="mm", stroke_width=stroke)
        at = (CANVAS - (left + right) / 2, CANVAS - (top + bottom) / 2)  # centered
        pen.text(at, character, fill=255, font=face, anchor="mm", stroke_width=stroke)
        return np.asarray(canvas)

    return torch.from_numpy(
        np.stack([[draw(c, face, stroke) for face in faces for stroke in strokes] for c in CHARACTERS])
    )


def handwrite(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Augment printed glyphs to resemble handwriting: [n, 64, 64] uint8 -> scans [n, 8, 8] uint8.

    The last steps are those that produced `load_digits`, according to its documentation: a 32x32 bitmap, normalized in
    size, of which the black pixels of each 4x4 block are counted, 0 to 16.
    """
    n = len(glyphs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def sample(image: Tensor, grid: Tensor) -> Tensor:  # [n, c, h, w] at [n, 32, 32, 2] -> [n, c, 32, 32]
        return F.grid_sample(image, grid, padding_mode="border", align_corners=False)

    size = [n, 1, BITMAP, BITMAP]
    glyphs = glyphs[:, None].float() / 255

    # Sampling positions: an affine map, plus a smooth random field that bends strokes.
    angle, shear, stretch = 0.15 * normal(), 0.2 * normal(), (0.15 * normal() + 0.05).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * stretch, shear - sin, sin, cos / stretch], -1).view(n, 2, 2)
    bend = F.interpolate(0.06 * normal(2, 5, 5), size=(BITMAP, BITMAP), mode="bicubic", align_corners=True)
    where = F.affine_grid(F.pad(rows, (0, 1)), size, align_corners=False) + bend.permute(0, 2, 3, 1)

    # Fit the bounding box to the bitmap: full height, or full width for glyphs that are wider than high.
    ticks = (torch.arange(BITMAP) + 0.5) * 2 / BITMAP - 1

    def extent(profile: Tensor) -> tuple[Tensor, Tensor]:  # [n, 32] -> center, half size, in [-1, 1]
        inked = profile > 0.25
        low = torch.where(inked, ticks, 1.0).amin(-1)
        high = torch.where(inked, ticks, -1.0).amax(-1)
        return (low + high) / 2, (high - low).clamp(min=0.1) / 2

    ink = sample(glyphs, where)[:, 0]
    (x, half_x), (y, half_y) = extent(ink.amax(1)), extent(ink.amax(2))
    scale = torch.maximum(half_y / uniform(0.9, 1.02), half_x / uniform(0.6, 0.85))
    x, y = x + 0.06 * scale * normal(), y + 0.02 * scale * normal()
    zero = torch.zeros(n)
    fit = torch.stack([scale, zero, x, zero, scale, y], -1).view(n, 2, 3)
    where = sample(where.permute(0, 3, 1, 2), F.affine_grid(fit, size, align_corners=False))
    ink = sample(glyphs, where.permute(0, 2, 3, 1))

    # Blur, and threshold at a random level, which changes the stroke width; then count and add noise.
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    ink = F.conv2d(ink, (kernel[:, None] * kernel)[None, None], padding=2)
    bits = ink > uniform(0.25, 0.55).view(n, 1, 1, 1) * ink.amax((1, 2, 3), keepdim=True)
    counts = 16 * F.avg_pool2d(bits.float(), BITMAP // SCAN)[:, 0] + 0.5 * normal(SCAN, SCAN)
    return (counts.round().clamp(0, 16) * (255 / 16)).round().to(torch.uint8)


def make_glyphs(atlas: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` scans [n, 8, 8] uint8 with their classes [n] int64; a third of them are digits."""
    generator = torch.Generator().manual_seed(seed)
    digit = torch.rand(n, generator=generator) < 1 / 3
    labels = torch.where(
        digit,
        torch.randint(10, (n,), generator=generator),
        torch.randint(10, len(CHARACTERS), (n,), generator=generator),
    )
    faces = torch.randint(atlas.shape[1], (n,), generator=generator)
    scans = [handwrite(atlas[c, f], generator) for c, f in zip(labels.split(1024), faces.split(1024))]
    return torch.cat(scans), labels


def preprocess(scans: Tensor, transform: Transform) -> Tensor:
    """The model's transform for a batch: [n, 8, 8] uint8 -> [n, 3, 32, 32] float32.

    For uint8 and with `antialias`, torch's bicubic resize is PIL's, to within one gray level.
    """
    big = F.interpolate(scans[:, None], size=(transform.size, transform.size), mode="bicubic", antialias=True)
    return transform.normalize(big.expand(-1, 3, -1, -1))


# -- training -------------------------------------------------------------------------------------------------------


def contrastive_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """CLIP's symmetric loss for images that share captions: logits [images, classes], labels [images] -> [].

    Image to text: cross-entropy over the classes. Text to image: every image of the class is a positive.
    """
    to_text = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    to_image = -logits.log_softmax(0).gather(1, labels[:, None])[:, 0]  # [images]
    count = labels.bincount(minlength=logits.shape[1]).clamp(min=1)
    present = labels.unique().numel()
    return (to_text + (to_image / count[labels]).sum() / present) / 2


def class_tokens(tokenize: Callable[[list[str]], Tensor]) -> list[Tensor]:
    """The captions of every class as token ids: one [captions, context_length] int64 per character."""
    return [tokenize(captions(character)) for character in CHARACTERS]


def draw_captions(tokens: list[Tensor], generator: torch.Generator) -> Tensor:
    """A random caption of every class: [classes, context_length] int64."""
    return torch.stack([t[int(torch.randint(len(t), (), generator=generator))] for t in tokens])


def read_captions(clip: Clip, settings: Settings) -> None:
    """Train the text tower alone to embed captions of the same class alike, before any image.

    Initially all captions, which differ in one word, have nearly the same embedding, and the joint loss decreases only
    after hundreds of steps. These few steps, cheap without images, replace them.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    model: Any = clip.net
    tokens = class_tokens(clip.tokenize)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("visual.")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    classes = torch.arange(len(tokens))
    model.train()
    for _ in range(settings.text_steps):
        one, other = (model.encode_text(draw_captions(tokens, generator), normalize=True) for _ in range(2))
        loss = F.cross_entropy(one @ other.T / 0.07, classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train(clip: Clip, scans: Tensor, labels: Tensor, settings: Settings) -> Iterator[tuple[int, float]]:
    """Train in place and yield (step, loss). Each step draws a new caption for every class."""
    generator = torch.Generator().manual_seed(settings.seed)
    model: Any = clip.net
    tokens = class_tokens(clip.tokenize)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
    warmup = max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)),
    )
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(scans), generator=generator)
        batch, order = order[: settings.batch], order[settings.batch :]
        text = model.encode_text(draw_captions(tokens, generator), normalize=True)
        image = model.encode_image(preprocess(scans[batch], clip.transform), normalize=True)
        scale = model.logit_scale.exp()
        loss = contrastive_loss(scale * image @ text.T, labels[batch], settings.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        yield step, loss.item()


@torch.no_grad()
def predict(clip: Clip, scans: Tensor, prompts: list[str]) -> Tensor:
    """The index of the nearest prompt of each scan: [n, 8, 8] uint8 -> [n] int64."""
    model: Any = clip.net.eval()
    text = model.encode_text(clip.tokenize(prompts), normalize=True)
    chunks = preprocess(scans, clip.transform).split(512)
    return torch.cat([(model.encode_image(chunk, normalize=True) @ text.T).argmax(-1) for chunk in chunks])


def digits_zero_shot(clip: Clip) -> float:
    """Zero-shot accuracy on `load_digits`."""
    source, prompts = digits(), [DIGIT_TEMPLATE.format(name) for name in DIGIT_NAMES]
    predicted = predict(clip, torch.from_numpy(source.images), prompts)
    return (predicted == torch.from_numpy(source.labels)).float().mean().item()


def pretrain(out: Path, settings: Settings) -> dict[str, Any]:
    """Render, train, evaluate and write `glyph-clip.safetensors`, fp32 with open_clip's names, and `glyph-clip.json`.

    Returns the record that is written to the JSON.
    """
    import safetensors.torch
    from rich.columns import Columns
    from rich.console import Console

    console = Console(highlight=False)
    start = time.perf_counter()
    clip = load_clip(EMBEDDED_MODEL, "none", settings.seed)
    atlas = render_atlas()
    scans, labels = make_glyphs(atlas, settings.glyphs, settings.seed)
    console.print(f"{len(scans):,} glyphs in {time.perf_counter() - start:.0f} s")
    read_captions(clip, settings)
    for step, loss in train(clip, scans, labels, settings):
        if step % 50 == 0 or step == settings.steps - 1:
            console.print(f"step {step:5d}  loss {loss:.3f}  {time.perf_counter() - start:4.0f} s")
    seconds = time.perf_counter() - start

    scans, labels = make_glyphs(atlas, max(620, settings.glyphs // 32), settings.seed + 1)
    correct = predict(clip, scans, [captions(character)[0] for character in CHARACTERS]) == labels
    console.print(f"accuracy on held-out glyphs {correct.float().mean():.3f}, by character:")
    console.print(Columns([f"{c} {correct[labels == i].float().mean():.2f}" for i, c in enumerate(CHARACTERS)]))
    zero_shot = digits_zero_shot(clip)
    console.print(f"zero-shot on load_digits {zero_shot:.4f}")
    record = {
        **asdict(settings),
        "torch": torch.__version__.split("+")[0],
        "glyphs_held_out": round(correct.float().mean().item(), 4),
        "digits_zero_shot": round(zero_shot, 4),
        "seconds": round(seconds),
    }
    state = {name: value.float().contiguous() for name, value in clip.net.state_dict().items()}
    write_atomic(out / f"{EMBEDDED_MODEL}.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    about = description(EMBEDDED_MODEL) | {"trained_with": record}
    write_atomic(out / f"{EMBEDDED_MODEL}.json", json.dumps(about, indent=2) + "\n")
    return record


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help=f"folder for {EMBEDDED_MODEL}.safetensors and {EMBEDDED_MODEL}.json"
    )
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    pretrain(given.pop("out"), Settings(**given))


if __name__ == "__main__":
    main()
