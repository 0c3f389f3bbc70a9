"""Attention over short sequences against its formula in fp64: the launchers, and torch's implementations on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdlp.kernels.attention import PLAIN_TOKENS, SHORT_TOKENS, fits, self_attention
from fastdlp.kernels.groups import RowGroups
from fastdlp.kernels.short_attention import attention_backward, attention_forward
from fastdlp.kernels.tiles import Tile, forced
from tests.awkward import DTYPES, PRECISIONS, Draw, assert_close, exact
from tests.pairs import cases
from tests.test_dual_lora_launch import loose

# Largest error over largest entry, RMS error over RMS: about four times what was measured in fp32 and fp16. Those of
# bf16 and TF32 are not measured; they follow from fp16's (bf16 has 3 bits less; TF32 has as many, but may truncate).
TOLERANCE = {"fp32": (3e-6, 2e-6), "fp16": (3e-3, 2e-3), "bf16": (2.4e-2, 1.6e-2), "tf32": (6e-3, 4e-3)}

IMAGES = {
    "one": RowGroups((1,)),
    "ragged": RowGroups((0, 1, 0, 1, 0)),
    "views": RowGroups((1, 0, 1), views=2),
    "nobody": RowGroups((0, 0), views=2),
}
TILES = [None, *(Tile(blocks={"BLOCK_Q": rows, "HEADS": heads}) for rows, heads in ((16, 1), (64, 0)))]
SHAPES = {
    "tokens": [1, 16, 50, 77, 128],
    "heads": [1, 2, 3],
    "head_dim": [16, 32, 64],
    "causal": [False, True],
    "tile": TILES,
    "strided": [False, True],
}


def attention(qkv: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    """The formula, on what has a dtype and device of its own."""
    head_dim = qkv.shape[1] // (3 * heads)
    q, k, v = qkv.view(len(qkv) // tokens, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(qkv), heads * head_dim)


def low_rank(o: Tensor, down: Tensor, groups: RowGroups, tokens: int) -> Tensor:
    """P = o Aᵀ, slot by slot."""
    P = o.new_full((len(o), down.shape[1]), float("nan"))
    for slot, _, start, end in groups.times(tokens).groups():
        P[start:end] = o[start:end] @ down[slot].T
    return P


@pytest.mark.usefixtures("guarded")
@cases(precision=PRECISIONS, name=IMAGES, low=[(0, 0), (16, 0), (32, 3), (48, 8)], **SHAPES)
def test_forward(
    name: str,
    low: tuple[int, int],
    tokens: int,
    heads: int,
    head_dim: int,
    causal: bool,
    tile: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    groups, width, (L, columns) = IMAGES[name], heads * head_dim, low
    draw, slots = Draw(device, DTYPES[precision]), len(IMAGES[name].sizes)
    qkv = draw(groups.rows * tokens, 3 * width)
    down = draw(slots, L + 16 * strided, width, scale=width**-0.5)[:, :L] if L else None
    nan_flag = torch.zeros(slots, columns + 3, device=device)[:, :columns] if columns else None
    given = (loose(qkv) if strided else qkv, heads, tokens, causal, down, nan_flag, groups)
    with forced("attention", tile):
        (o, P), again = attention_forward(*given), attention_forward(*given)
    expected = attention(exact(qkv), heads, tokens, causal)
    assert_close(o, expected, TOLERANCE[precision], "o")
    assert (o.dtype, o.is_contiguous()) == (qkv.dtype, True)
    assert (P is None) == (down is None)
    if P is not None and down is not None:
        assert P.dtype == o.dtype
        assert_close(P, low_rank(expected, exact(down), groups, tokens), TOLERANCE[precision], "P")
    assert all(torch.equal(*pair) for pair in zip((o, P), again) if pair[0] is not None)


@pytest.mark.usefixtures("guarded")
@cases(precision=PRECISIONS, images=[1, 2, 0], **SHAPES)
def test_backward(
    images: int,
    tokens: int,
    heads: int,
    head_dim: int,
    causal: bool,
    tile: Tile | None,
    strided: bool,
    precision: str,
    device: torch.device,
) -> None:
    draw, width = Draw(device, DTYPES[precision]), heads * head_dim
    qkv, do = draw(images * tokens, 3 * width), draw(images * tokens, width)
    given = (*((loose(qkv), loose(do)) if strided else (qkv, do)), heads, tokens, causal)
    with forced("attention_backward", tile):
        dqkv, again = attention_backward(*given), attention_backward(*given)
    leaf = exact(qkv).requires_grad_()
    (expected,) = torch.autograd.grad(attention(leaf, heads, tokens, causal), leaf, exact(do))
    # dq and dk of a single key are zero, so all three are measured by the largest.
    assert_close(dqkv, expected, TOLERANCE[precision], "dqkv")
    if tokens > 1:
        for part, ours, reference in zip("qkv", dqkv.chunk(3, 1), expected.chunk(3, 1)):
            assert_close(ours, reference, TOLERANCE[precision], f"d{part}")
    assert torch.equal(dqkv, again)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_large_and_small_scores(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Scores of 900 · √d, whose exponential no dtype holds, and scores near zero."""
    draw = Draw(device, dtype)
    qkv, do = draw(2 * 50, 3 * 32, scale=scale), draw(2 * 50, 32)
    leaf = exact(qkv).requires_grad_()
    expected = attention(leaf, 2, 50, True)
    (gradient,) = torch.autograd.grad(expected, leaf, exact(do))
    tolerance = (2e-3, 1e-3) if dtype == torch.float32 else (2e-2, 1e-2)  # fp32 holds the large scores to 1e-4
    assert_close(attention_forward(qkv, 2, 50, True)[0], expected, tolerance, "o")
    assert_close(attention_backward(qkv, do, 2, 50, True), gradient, tolerance, "dqkv")


@pytest.mark.usefixtures("guarded")
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # the interpreter's
@pytest.mark.parametrize("what", ["nan_flag", "down", "qkv"])
def test_a_diverged_slot_keeps_its_nan_to_itself(what: str, device: torch.device) -> None:
    groups, tokens, draw = IMAGES["views"], 50, Draw(device, torch.float32)
    rows = groups.rows * tokens
    qkv, do = draw(rows, 3 * 96), draw(rows, 96)
    down, nan_flag = draw(3, 16, 96), torch.zeros(3, 5, device=device)
    first = list(groups.times(tokens).groups())[4][2]  # of slot 2, the last
    before = (
        *attention_forward(qkv, 3, tokens, False, down, nan_flag, groups),
        attention_backward(qkv, do, 3, tokens, False),
    )
    {"nan_flag": nan_flag[2, 1:2], "down": down[2, 3], "qkv": qkv[first:, 7]}[what].fill_(float("nan"))
    after = (
        *attention_forward(qkv, 3, tokens, False, down, nan_flag, groups),
        attention_backward(qkv, do, 3, tokens, False),
    )
    for ours, theirs in zip(before, after):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours[:first], theirs[:first])
        assert torch.equal(ours[first:], theirs[first:]) or theirs[first:].isnan().any(1).all()
    assert after[1] is not None
    assert after[1][first:].isnan().any(1).all()


def test_p_needs_the_groups_of_its_images(device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    for groups in (None, RowGroups((1,))):
        with pytest.raises(ValueError, match="P of 2 images needs their groups"):
            attention_forward(draw(10, 48), 1, 5, False, draw(1, 16, 16), None, groups)


def test_what_fits() -> None:
    assert [fits(tokens, 64) for tokens in (0, 1, SHORT_TOKENS, SHORT_TOKENS + 1)] == [False, True, True, False]
    assert [d for d in range(1, 257) if fits(50, d)] == [16, 32, 64]


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("tokens", [1, 9, PLAIN_TOKENS + 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_self_attention_on_a_cpu(grad: bool, causal: bool, tokens: int, dtype: torch.dtype, precision: str) -> None:
    """Value and gradient, of a slice and with a gradient that is one number expanded."""
    qkv = Draw(torch.device("cpu"), dtype)(3, tokens, 96 + 4)[..., 2:-2].requires_grad_(grad)
    leaf = exact(qkv).requires_grad_(grad)
    ours = self_attention(qkv, 2, causal)
    reference = attention(leaf.reshape(3 * tokens, 96), 2, tokens, causal).view(3, tokens, 32)
    assert_close(ours, reference, TOLERANCE[precision], "o")
    if grad:
        (gradient,), (expected,) = torch.autograd.grad(ours.sum(), qkv), torch.autograd.grad(reference.sum(), leaf)
        assert_close(gradient, expected, TOLERANCE[precision], "dqkv")


BIG = 40e9  # bytes of a GPU on which the largest test fits


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < BIG,
    reason="needs a CUDA GPU with 40 GB",
)
def test_more_entries_than_32_bits_count(device: torch.device) -> None:
    """The last image comes out as it does alone."""
    images, width = 2**31 // (50 * 3 * 768) + 2, 768
    qkv = torch.ones(images * 50, 3 * width, device=device, dtype=torch.bfloat16)
    qkv[-50:] = Draw(device, torch.bfloat16)(50, 3 * width)
    down, do = Draw(device, torch.bfloat16)(2, 16, width), qkv[:, :width]
    groups, alone = RowGroups((images - 1, 1)), RowGroups((0, 1))
    all_rows = *attention_forward(qkv, 12, 50, False, down, None, groups), attention_backward(qkv, do, 12, 50, False)
    last = qkv[-50:]
    own = *attention_forward(last, 12, 50, False, down, None, alone), attention_backward(last, do[-50:], 12, 50, False)
    for ours, theirs in zip(all_rows, own):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours[-50:], theirs)
