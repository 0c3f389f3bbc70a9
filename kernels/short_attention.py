"""Attention over sequences so short that one program holds them whole: kernels, launchers and torch ops.

Queries, keys and values are read where the packed projection has left them, and their gradients are written where its
backward reads them, so nothing is copied or transposed in between. The backward computes the probabilities anew: no
statistics are kept, and rowsum(P ⊙ dP) needs no output. The forward may also make the low-rank product P = o Aᵀ of
the linear behind it, while o is in registers.

Triton is imported with this module, so import it only where a kernel is launched, as `attention.py` does, which also
says what fits. For attention alone `fastdlp::short_attention` and `fastdlp::short_attention_backward` are custom ops
with fake and autograd registrations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.groups import RowGroups, row_group
from fastdlp.kernels.launch import last_contiguous, launch, precision
from fastdlp.kernels.tiles import Tile, tile_for

# Differ from batch to batch and scale no address that is read in vectors: not worth a compilation each.
COUNTS = ["tokens", "heads"]


@triton.jit
def _probabilities(q, k, query, key, tokens, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """exp(q kᵀ / √d − maximum) [queries, keys] in fp32, 0 where a key is not seen, and the sum of every row."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = key[None, :] <= tl.minimum(query, tokens - 1)[:, None] if CAUSAL else (key < tokens)[None, :]
    scores = tl.where(seen, scores, float("-inf"))  # every row sees key 0, so no maximum is −∞
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _keep_apart(operand):
    """Between fp32 products, which are unrolled: ptxas would load the operands of several at once, and spill."""
    if operand.dtype == tl.float32:
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def attention_kernel(
    qkv_ptr,
    o_ptr,
    down_ptr,
    poison_ptr,
    image_group_ptr,
    low_ptr,
    tokens,
    heads,
    stride_qkv,
    stride_down,
    stride_poison,
    scale,
    VIEWS: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    POISON: tl.constexpr,
    BLOCK_POISON: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """o = softmax(q kᵀ / √d) v of HEADS heads of an image, and with L > 0 P = o Aᵀ [tokens, L] over all heads.

    A program takes BLOCK_Q queries of an image. Grid (images · tiles of queries · heads / HEADS): neighbours share an
    image. `scale` is log₂e / √d. The sum of a slot's POISON columns, 0 or NaN, is added to the P of its images: so a
    slot that has diverged loses its own rows and no others.

    A head takes 4·BLOCK_T·d FLOP a query, padded ones too, and 2·d·L for P. In bf16 it reads 6·tokens·d bytes, keys and
    values once a tile of queries, and writes 2·tokens·d. A program reads A, 2·L·width bytes, and P takes 2·tokens·L;
    `down_kernel` would read o again: 2·tokens·width bytes less.
    """
    program, parts, tiles = tl.program_id(0), heads // HEADS, tl.cdiv(tokens, BLOCK_Q)
    first = program % parts * HEADS
    image = (program // parts // tiles).to(tl.int64)
    width = heads * HEAD_DIM
    query, key = program // parts % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_T)
    d, l = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_L)
    in_q, in_k = (query < tokens)[:, None], (key < tokens)[:, None]
    row = image * tokens
    qkv_ptr += row * stride_qkv + first * HEAD_DIM
    q_ptrs = qkv_ptr + (query[:, None] * stride_qkv + d[None, :])
    k_ptrs = qkv_ptr + width + (key[:, None] * stride_qkv + d[None, :])
    o_ptrs = o_ptr + row * width + first * HEAD_DIM + (query[:, None] * width + d[None, :])
    if L > 0:
        slot = tl.load(image_group_ptr + image).to(tl.int64) // VIEWS
        a_ptrs = down_ptr + slot * stride_down + (l[:, None] * width + d[None, :])
        low = tl.zeros((BLOCK_L, BLOCK_Q), dtype=tl.float32)
    for _ in range(HEADS):
        q = tl.load(q_ptrs, mask=in_q, other=0.0)
        k = tl.load(k_ptrs, mask=in_k, other=0.0)
        v = tl.load(k_ptrs + width, mask=in_k, other=0.0)
        p, total = _probabilities(q, k, query, key, tokens, scale, CAUSAL, PRECISION)
        _keep_apart(q)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        o = o.to(v.dtype)
        tl.store(o_ptrs, o, mask=in_q)
        if L > 0:
            a = tl.load(a_ptrs, mask=(l < L)[:, None], other=0.0)
            # Pᵀ = A oᵀ: of three products in a row the compiler would give whole rows to every warp, and spill.
            low = tl.dot(a, tl.trans(o), low, input_precision=PRECISION)
            a_ptrs += HEAD_DIM
        q_ptrs += HEAD_DIM
        k_ptrs += HEAD_DIM
        o_ptrs += HEAD_DIM
    if L > 0:
        if POISON > 0:
            f = tl.arange(0, BLOCK_POISON)
            low += tl.sum(tl.load(poison_ptr + slot * stride_poison + f, mask=f < POISON, other=0.0), 0)
        low_ptrs = low_ptr + row * L + (query[None, :] * L + l[:, None])
        tl.store(low_ptrs, low, mask=(query < tokens)[None, :] & (l < L)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_kernel(
    qkv_ptr,
    do_ptr,
    dqkv_ptr,
    tokens,
    heads,
    stride_qkv,
    stride_do,
    scale,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dq, dk and dv of HEADS heads of an image, packed. Grid (images · heads / HEADS).

    With P the probabilities and dP = dO vᵀ: dS = P ⊙ (dP − rowsum(P ⊙ dP)), dv = Pᵀ dO, dq = dS k / √d and
    dk = dSᵀ q / √d. Queries go by BLOCK_Q at a time, QUERIES ≥ tokens of them; a constant, because a loop of one step
    costs registers where the compiler does not know it. `scale` is log₂e / √d.

    A head takes 10·QUERIES·BLOCK_T·d FLOP; in bf16 it reads 8·tokens·d bytes and writes 6·tokens·d.
    """
    program, parts = tl.program_id(0), heads // HEADS
    first, image = program % parts * HEADS, (program // parts).to(tl.int64)
    width = heads * HEAD_DIM
    key, d = tl.arange(0, BLOCK_T), tl.arange(0, HEAD_DIM)
    in_k = (key < tokens)[:, None]
    row = image * tokens
    qkv_ptr += row * stride_qkv + first * HEAD_DIM
    do_ptr += row * stride_do + first * HEAD_DIM
    dqkv_ptr += row * 3 * width + first * HEAD_DIM
    inverse_root = scale * 0.6931471805599453  # ln 2: 1 / √d
    for _ in range(HEADS):
        k_ptrs = qkv_ptr + width + (key[:, None] * stride_qkv + d[None, :])
        k = tl.load(k_ptrs, mask=in_k, other=0.0)
        v = tl.load(k_ptrs + width, mask=in_k, other=0.0)
        dk = tl.zeros((BLOCK_T, HEAD_DIM), dtype=tl.float32)
        dv = tl.zeros((BLOCK_T, HEAD_DIM), dtype=tl.float32)
        for start in tl.range(0, QUERIES, BLOCK_Q, num_stages=1):
            query = start + tl.arange(0, BLOCK_Q)
            in_q = (query < tokens)[:, None]
            q = tl.load(qkv_ptr + (query[:, None] * stride_qkv + d[None, :]), mask=in_q, other=0.0)
            # 0 in the padded rows, so dS is, though their P is not.
            do = tl.load(do_ptr + (query[:, None] * stride_do + d[None, :]), mask=in_q, other=0.0)
            p, total = _probabilities(q, k, query, key, tokens, scale, CAUSAL, PRECISION)
            p = p / total[:, None]
            _keep_apart(q)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
            _keep_apart(q)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            _keep_apart(q)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            _keep_apart(q)
            dq = tl.dot(ds, k, input_precision=PRECISION) * inverse_root
            tl.store(dqkv_ptr + (query[:, None] * (3 * width) + d[None, :]), dq, mask=in_q)
        dk_ptrs = dqkv_ptr + width + (key[:, None] * (3 * width) + d[None, :])
        tl.store(dk_ptrs, dk * inverse_root, mask=in_k)
        tl.store(dk_ptrs + width, dv, mask=in_k)
        qkv_ptr += HEAD_DIM
        do_ptr += HEAD_DIM
        dqkv_ptr += HEAD_DIM


def attention_forward(
    qkv: Tensor,
    heads: int,
    tokens: int,
    causal: bool,
    down: Tensor | None = None,
    poison: Tensor | None = None,
    groups: RowGroups | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a packed projection, and where `down` is given P = o Aᵀ of the linear behind it.

    Args:
        qkv: [M, 3 · width], M = images · tokens: queries, keys and values side by side.
        heads: divides width.
        causal: a query sees the keys up to its own position.
        down: [slots, L, width], A in the compute dtype, each slot's contiguous.
        poison: [slots, F] fp32 of 0 or NaN, whose sum over F is added to the P of a slot's images.
        groups: the split of the images; needed with `down`.

    Returns:
        o [M, width] and P [M, L], or None.
    """
    images, width = len(qkv) // tokens, qkv.shape[1] // 3
    tile = tile or _tile("attention", qkv, heads, tokens)
    o = qkv.new_empty(len(qkv), width)
    P = table = None
    L, views, together = 0, 1, math.gcd(tile["HEADS"], heads)
    if down is not None:
        if groups is None or groups.rows != images:
            raise ValueError(f"attention_forward: P of {images} images needs their groups, not {groups}")
        L, views, together = down.shape[1], groups.views, heads
        P, table = qkv.new_empty(len(qkv), L), row_group(groups, qkv.device)
    columns = 0 if poison is None else poison.shape[1]
    shape = _shape(qkv, heads, tokens, causal)
    queries = min(tile["BLOCK_Q"], shape["BLOCK_T"])
    launch(
        attention_kernel,
        (images * -(-tokens // queries) * (heads // together),),
        qkv,
        o,
        down,
        poison,
        table,
        P,
        tokens,
        heads,
        qkv.stride(0),
        0 if down is None else down.stride(0),
        0 if poison is None else poison.stride(0),
        _scale(width // heads),
        VIEWS=views,
        L=L,
        BLOCK_L=max(16, _power(L)),
        POISON=columns,
        BLOCK_POISON=_power(columns),
        **shape,
        **tile.launch | {"BLOCK_Q": queries, "HEADS": together},
    )
    return o, P


def attention_backward(
    qkv: Tensor, do: Tensor, heads: int, tokens: int, causal: bool, tile: Tile | None = None
) -> Tensor:
    """dqkv [M, 3 · width] of `attention_forward`'s o: qkv [M, 3 · width], do [M, width]."""
    images, width = len(qkv) // tokens, qkv.shape[1] // 3
    tile = tile or _tile("attention_backward", qkv, heads, tokens)
    dqkv = qkv.new_empty(len(qkv), 3 * width)
    shape = _shape(qkv, heads, tokens, causal)
    queries, together = min(tile["BLOCK_Q"], shape["BLOCK_T"]), math.gcd(tile["HEADS"], heads)
    launch(
        attention_backward_kernel,
        (images * (heads // together),),
        qkv,
        do,
        dqkv,
        tokens,
        heads,
        qkv.stride(0),
        do.stride(0),
        _scale(width // heads),
        QUERIES=-(-tokens // queries) * queries,
        **shape,
        **tile.launch | {"BLOCK_Q": queries, "HEADS": together},
    )
    return dqkv


def _tile(kernel: str, qkv: Tensor, heads: int, tokens: int) -> Tile:
    """The table's row for M; N and K are keys and head dimension, as of the scores q kᵀ."""
    return tile_for(kernel, qkv.device, qkv.dtype.itemsize, len(qkv), _block(tokens), qkv.shape[1] // (3 * heads))


def _shape(qkv: Tensor, heads: int, tokens: int, causal: bool) -> dict[str, Any]:
    """The constexprs that both kernels have."""
    head_dim = qkv.shape[1] // (3 * heads)
    return {"HEAD_DIM": head_dim, "CAUSAL": causal, "PRECISION": precision(qkv), "BLOCK_T": _block(tokens)}


def _block(tokens: int) -> int:
    return max(16, _power(tokens))


def _power(size: int) -> int:
    """The next power of two: what tl.arange takes."""
    return 1 << max(size - 1, 0).bit_length()


def _scale(head_dim: int) -> float:
    return math.log2(math.e) * head_dim**-0.5


def short_attention(qkv: Tensor, heads: int, tokens: int, causal: bool = False) -> Tensor:
    """Attention of a packed projection, differentiable: qkv [M, 3 · width], M = images · tokens → [M, width]."""
    return short_attention_op(qkv, heads, tokens, causal)


def forward_pass(qkv: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    """o [M, width] of qkv [M, 3 · width]."""
    return attention_forward(last_contiguous(qkv), heads, tokens, causal)[0]


short_attention_op = torch.library.custom_op("fastdlp::short_attention", forward_pass, mutates_args=())


@short_attention_op.register_fake
def _(qkv: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def backward_pass(do: Tensor, qkv: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    """dqkv [M, 3 · width] of do [M, width]."""
    return attention_backward(last_contiguous(qkv), last_contiguous(do), heads, tokens, causal)


short_attention_backward_op = torch.library.custom_op(
    "fastdlp::short_attention_backward", backward_pass, mutates_args=()
)


@short_attention_backward_op.register_fake
def _(do: Tensor, qkv: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    return short_attention_backward_op(do, *ctx.saved_tensors, *ctx.options), None, None, None


short_attention_op.register_autograd(_backward, setup_context=_setup_context)
