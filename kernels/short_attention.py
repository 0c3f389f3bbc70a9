"""Attention over sequences so short that one program holds a whole one: kernels and launchers.

Queries, keys and values are read from the packed projection's output, and their gradients are written where its
backward reads them, so nothing is copied or transposed in between. The backward recomputes the probabilities: no
statistics are saved, and rowsum(P ⊙ dP) needs no output. The forward also computes the low-rank product P = o Aᵀ of the
next linear while o is in registers.

Importing this module imports Triton, so import it only where a kernel is launched. `attention.fits` says which
sequences are short enough.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.groups import RowGroups, row_group
from fastdlp.kernels.launch import launch, precision, row_stride
from fastdlp.kernels.tiles import tile_for

# Vary from batch to batch and do not affect the alignment of vector loads: not worth a recompilation each.
COUNTS = ["tokens", "heads"]


@triton.jit
def _probabilities(q, k, query, key, tokens, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """exp(q kᵀ / √d − max) [queries, keys] in fp32, 0 for masked keys, and the sum of every row."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    mask = key[None, :] <= tl.minimum(query, tokens - 1)[:, None] if CAUSAL else (key < tokens)[None, :]
    scores = tl.where(mask, scores, float("-inf"))  # every row attends to key 0, so no maximum is −∞
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _fp32_barrier(operand):
    """Between fp32 products, which are unrolled: ptxas would load the operands of several at once and spill."""
    if operand.dtype == tl.float32:
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def attention_kernel(
    qkv_ptr,
    o_ptr,
    down_ptr,
    nan_flag_ptr,
    image_group_ptr,
    low_ptr,
    tokens,
    heads,
    stride_qkv,
    stride_down,
    stride_flag,
    scale,
    VIEWS: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """o = softmax(q kᵀ / √d) v of HEADS heads of an image, and with L > 0 P = o Aᵀ [tokens, L] over all heads.

    A program computes BLOCK_Q queries of an image. Grid (images · tiles of queries · heads / HEADS): neighboring
    programs share an image. `scale` is log₂e / √d. The sum of a slot's FLAGS columns of `nan_flag`, 0 or NaN, is added
    to the P of its images, so that a diverged slot affects its own rows only.

    4·BLOCK_T·d FLOPs per head and query, padded ones too, and 2·d·L for P. In bf16 a head reads 6·tokens·d bytes, keys
    and values once a tile of queries, and writes 2·tokens·d. A program reads A, 2·L·width bytes, and writes 2·tokens·L
    of P. Saves the 2·tokens·width bytes of o that `down_kernel` would read.
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
        _fp32_barrier(q)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        o = o.to(v.dtype)
        tl.store(o_ptrs, o, mask=in_q)
        if L > 0:
            a = tl.load(a_ptrs, mask=(l < L)[:, None], other=0.0)
            # Pᵀ = A oᵀ: for three chained products the compiler would assign whole rows to every warp, and spill.
            low = tl.dot(a, tl.trans(o), low, input_precision=PRECISION)
            a_ptrs += HEAD_DIM
        q_ptrs += HEAD_DIM
        k_ptrs += HEAD_DIM
        o_ptrs += HEAD_DIM
    if L > 0:
        if FLAGS > 0:
            f = tl.arange(0, BLOCK_F)
            low += tl.sum(tl.load(nan_flag_ptr + slot * stride_flag + f, mask=f < FLAGS, other=0.0), 0)
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
    dk = dSᵀ q / √d. Loops over QUERIES ≥ tokens, BLOCK_Q at a time; QUERIES is a constant, because a loop of one
    iteration costs registers if the compiler does not know its length. `scale` is log₂e / √d.

    10·QUERIES·BLOCK_T·d FLOPs per head; in bf16 it reads 8·tokens·d bytes and writes 6·tokens·d.
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
            # 0 in the padded rows, so that dS is 0 there although P is not.
            do = tl.load(do_ptr + (query[:, None] * stride_do + d[None, :]), mask=in_q, other=0.0)
            p, total = _probabilities(q, k, query, key, tokens, scale, CAUSAL, PRECISION)
            p = p / total[:, None]
            _fp32_barrier(q)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
            _fp32_barrier(q)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            _fp32_barrier(q)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            _fp32_barrier(q)
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
    nan_flag: Tensor | None = None,
    groups: RowGroups | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a packed projection and, with `down`, P = o Aᵀ of the next linear.

    Args:
        qkv: [M, 3 · width], M = images · tokens: queries, keys and values side by side.
        heads: divides width.
        causal: a query attends to the keys up to its own position.
        down: [slots, L, width], A in the compute dtype, each slot's contiguous.
        nan_flag: [slots, F] fp32 of 0 or NaN, whose sum over F is added to the P of a slot's images.
        groups: the grouping of the images; required with `down`.

    Returns:
        o [M, width] and P [M, L], or None.
    """
    images, width = len(qkv) // tokens, qkv.shape[1] // 3
    shared = _constexprs("attention", qkv, heads, tokens, causal)
    o = qkv.new_empty(len(qkv), width)
    P = image_groups = None
    L, views, heads_per_program = 0, 1, shared["HEADS"]
    if down is not None:
        if groups is None or groups.rows != images:
            raise ValueError(f"attention_forward: P of {images} images needs their groups, not {groups}")
        L, views, heads_per_program = down.shape[1], groups.views, heads
        P, image_groups = qkv.new_empty(len(qkv), L), row_group(groups, qkv.device)
    flags = 0 if nan_flag is None else nan_flag.shape[1]
    tensors = (qkv, o, down, nan_flag, image_groups, P)
    launch(
        attention_kernel,
        (images * triton.cdiv(tokens, shared["BLOCK_Q"]) * (heads // heads_per_program),),
        *tensors,
        tokens,
        heads,
        qkv.stride(0),
        row_stride(down),
        row_stride(nan_flag),
        _scale(width // heads),
        VIEWS=views,
        L=L,
        BLOCK_L=max(16, triton.next_power_of_2(L)),
        FLAGS=flags,
        BLOCK_F=max(1, triton.next_power_of_2(flags)),
        **shared | {"HEADS": heads_per_program},
    )
    return o, P


def attention_backward(qkv: Tensor, do: Tensor, heads: int, tokens: int, causal: bool) -> Tensor:
    """dqkv [M, 3 · width] of `attention_forward`'s o: qkv [M, 3 · width], do [M, width]."""
    images, width = len(qkv) // tokens, qkv.shape[1] // 3
    dqkv = qkv.new_empty(len(qkv), 3 * width)
    shared = _constexprs("attention_backward", qkv, heads, tokens, causal)
    launch(
        attention_backward_kernel,
        (images * (heads // shared["HEADS"]),),
        qkv,
        do,
        dqkv,
        tokens,
        heads,
        qkv.stride(0),
        do.stride(0),
        _scale(width // heads),
        QUERIES=triton.cdiv(tokens, shared["BLOCK_Q"]) * shared["BLOCK_Q"],
        **shared,
    )
    return dqkv


def _constexprs(kernel: str, qkv: Tensor, heads: int, tokens: int, causal: bool) -> dict[str, Any]:
    """The constexprs that both kernels have; N and K of their tile are those of the scores q kᵀ."""
    block_t, head_dim = max(16, triton.next_power_of_2(tokens)), qkv.shape[1] // (3 * heads)
    tile = tile_for(kernel, qkv.device, qkv.dtype.itemsize, len(qkv), block_t, head_dim)
    sizes = {"BLOCK_T": block_t, "BLOCK_Q": min(tile["BLOCK_Q"], block_t), "HEADS": math.gcd(tile["HEADS"], heads)}
    flags = {"HEAD_DIM": head_dim, "CAUSAL": causal, "PRECISION": precision(qkv)}
    return tile.launch | sizes | flags


def _scale(head_dim: int) -> float:
    return math.log2(math.e) * head_dim**-0.5
