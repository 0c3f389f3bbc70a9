"""The jit code of the dual-LoRA operator. `dual_lora_launch.py` launches it, `dual_lora.py` has the maths.

Conventions of every kernel here:

- rows are sorted by group; `row_group_ptr` [M] int32 says which, and a *chunk* is a run of rows within one group (or
  slot), listed in a table [3, chunks] int32 of (owner, first row, end row);
- a tile's first row is int64 before it meets a stride, because M · N passes 2³¹ for a hundred clients of ViT-L/14;
  within the tile 32 bits hold every offset, and registers are scarce;
- products accumulate in fp32, and nothing is added atomically: sums across programs go through partial results and
  `sum_chunks_kernel`, in a fixed order, so every run gives the same bits;
- a masked load reads 0, never what lies behind the end, so unwritten memory cannot reach a result.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Differ from batch to batch and scale no address that is read in vectors: not worth a compilation each.
COUNTS = ["chunks", "M", "slots"]


@triton.jit
def _activated(u, ACTIVATION: tl.constexpr):
    """φ(u) and φ'(u) in fp32; what the caller does not use is not computed."""
    if ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * u)
        return u * s, s * (1.0 + 1.702 * u * (1.0 - s))
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        return u * phi, phi + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:  # gelu_tanh, by tanh(z) = 2 sigmoid(2z) − 1
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        return u * s, s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)


@triton.jit
def fold_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    down_ptr,
    up_ptr,
    K,
    N,
    stride_a,
    stride_b,
    stride_cs,
    stride_cv,
    stride_cp,
    PARTS: tl.constexpr,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """down = A in the compute dtype; up[g] = (B · diag(c_g))ᵀ, rounded once. Grid (slots, PARTS, tiles of max(K, N)).

    Per slot reads 4·parts·R·(K + N) bytes, writes 2·parts·R·(K + views·N) in bf16; parts·R·views·N products.
    """
    slot, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    in_k = (r < R)[:, None] & (at < K)[None, :]
    a = tl.load(a_ptr + slot * stride_a + (part * R + r)[:, None] * K + at[None, :], mask=in_k, other=0.0)
    tl.store(down_ptr + (slot * PARTS * R + part * R + r)[:, None] * K + at[None, :], a, mask=in_k)
    in_n = (r < R)[:, None] & (at < N)[None, :]
    b = tl.load(b_ptr + slot * stride_b + (part * N + at)[None, :] * R + r[:, None], mask=in_n, other=0.0)
    for view in tl.static_range(VIEWS):
        c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + part * stride_cp + r, mask=r < R, other=0.0)
        up = b.to(tl.float32) * c.to(tl.float32)[:, None]
        row = (slot * VIEWS + view) * PARTS * R + part * R + r
        tl.store(up_ptr + row[:, None] * N + at[None, :], up, mask=in_n)


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    x_ptr,
    down_ptr,
    p_ptr,
    chunk_ptr,
    chunks,
    K,
    stride_xm,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P = x Aᵀ over all parts, [M, L] with L = parts · R. One program a chunk of a slot's rows.

    2·M·K·L FLOP; reads 2·M·K bytes of x (bf16) and A once a chunk, writes 2·M·L: bound by reading x.
    """
    chunk = tl.program_id(0)
    slot = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    m, l, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    here = m < tl.load(chunk_ptr + 2 * chunks + chunk) - start
    x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
    a_ptrs = down_ptr + slot * L * K + (l[None, :] * K + k[:, None])
    acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs + k0, mask=here[:, None] if EVEN_K else here[:, None] & in_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k0, mask=(l < L)[None, :] if EVEN_K else (l < L)[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    tl.store(p_ptr + start * L + (m[:, None] * L + l[None, :]), acc, mask=here[:, None] & (l < L)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def norm_down_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_ptr,
    h_ptr,
    stats_ptr,
    p_ptr,
    chunk_ptr,
    chunks,
    M,
    K,
    stride_xm,
    eps,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = LayerNorm(x) and P = h Aᵀ in one program a chunk: x comes from memory once, the second time from cache.

    Mean and variance are merged tile by tile (Chan), so a large mean does not cancel the variance. `stats` [2, M] fp32
    keeps mean and 1/σ for the backward. Reads 2·M·K bytes of x (bf16), writes 2·M·K of h; a LayerNorm followed by
    `down_kernel` would read h again: M·K·2 bytes less of M·K·6. 2·M·K·L + ~9·M·K FLOP.
    """
    chunk = tl.program_id(0)
    slot = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    m, l, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    here = m < tl.load(chunk_ptr + 2 * chunks + chunk) - start
    x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs + k0, mask=here[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        count = tl.minimum(BLOCK_K, K - k0).to(tl.float32)
        tile_mean = tl.sum(x, 1) / count
        off = tl.where(in_k[None, :], x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = count / (k0 + count)
        m2 += tl.sum(off * off, 1) + delta * delta * share * k0
        mean += delta * share
    rstd = 1.0 / tl.sqrt(m2 / K + eps)
    tl.store(stats_ptr + start + m, mean, mask=here)
    tl.store(stats_ptr + M + start + m, rstd, mask=here)

    a_ptrs = down_ptr + slot * L * K + (l[None, :] * K + k[:, None])
    h_ptrs = h_ptr + start * K + (m[:, None] * K + k[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        mask = here[:, None] & in_k[None, :]
        x = tl.load(x_ptrs + k0, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(norm_weight_ptr + k0 + k, mask=in_k, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + k0 + k, mask=in_k, other=0.0).to(tl.float32)
        h = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptrs + k0, h, mask=mask)
        a = tl.load(a_ptrs + k0, mask=(l < L)[None, :] & in_k[:, None], other=0.0)
        acc = tl.dot(h, a, acc, input_precision=PRECISION)
    tl.store(p_ptr + start * L + (m[:, None] * L + l[None, :]), acc, mask=here[:, None] & (l < L)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    dh_ptr, x_ptr, stats_ptr, norm_weight_ptr, dx_ptr, M, K, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """dx of a LayerNorm with frozen weights: rstd · (g − mean(g) − x̂ · mean(g ⊙ x̂)), g = dh ⊙ weight.

    A program holds whole rows (BLOCK_K ≥ K). Reads 4·M·K bytes (bf16), writes 2·M·K; ~10·M·K FLOP.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    here = m < M - start
    mask = here[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    dh = tl.load(dh_ptr + start * K + at, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * stride_xm + (m[:, None] * stride_xm + k[None, :])
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    mean = tl.load(stats_ptr + start + m, mask=here, other=0.0)
    rstd = tl.load(stats_ptr + M + start + m, mask=here, other=0.0)
    g = dh * weight[None, :]
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g_mean, gx_mean = tl.sum(g, 1) / K, tl.sum(g * xhat, 1) / K
    dx = rstd[:, None] * (g - g_mean[:, None] - xhat * gx_mean[:, None])
    tl.store(dx_ptr + start * K + at, dx, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    row_group_ptr,
    residual_ptr,
    y_ptr,
    slope_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_rm,
    PARTS: tl.constexpr,
    GROUPS_PER_UP: tl.constexpr,
    L: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = φ(x · w + bias + low · up[group]) + residual, the frozen product with its low-rank term, in one pass.

    Forward: w = Wᵀ, low = P, up = B' of the row's group, PARTS column blocks of N, each with RANK columns of `low`.
    Backward: w = W, x = dY, low = Q, up = A of the row's slot (GROUPS_PER_UP views share it), RANK = L.

    The accumulator starts with the low-rank term, group by group of those that the tile's rows belong to: one dot of
    BLOCK_R in most tiles, and a tile that crosses groups is as right as any other. The K loop knows nothing of it.

    With KEEP an activation's slope φ'(u) goes out beside y: the backward needs nothing else of u, and would otherwise
    compute it in every layout that its two products want dY in.

    2·M·PARTS·N·(K + RANK) FLOP; in bf16 reads 2·(M·K + PARTS·N·K + M·L) bytes and `up`, writes 2·M·PARTS·N (twice with
    KEEP), reads as much again for a residual.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), PARTS * tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n  # neighbouring programs share rows and columns in L2
    first_m = pid // band * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m, tile_n = first_m + pid % band % height, pid % band // height
    part, tile_n = tile_n // tl.cdiv(N, BLOCK_N), tile_n % tl.cdiv(N, BLOCK_N)

    corner = tile_m.to(tl.int64) * BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    here, in_n = m < M - tile_m * BLOCK_M, n < N - tile_n * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row_group_ptr += corner
    owner = tl.load(row_group_ptr + m, mask=here, other=-1) // GROUPS_PER_UP
    first = tl.load(row_group_ptr) // GROUPS_PER_UP
    last = tl.load(row_group_ptr + tl.minimum(BLOCK_M, M - tile_m * BLOCK_M) - 1) // GROUPS_PER_UP
    low_ptrs = low_ptr + corner * L + part * RANK + m[:, None] * L + r[None, :]
    low = tl.load(low_ptrs, mask=here[:, None] & (r < RANK)[None, :], other=0.0)
    for group in tl.range(first, last + 1, num_stages=1):
        up_ptrs = up_ptr + tile_n * BLOCK_N + (group * L + part * RANK + r.to(tl.int64))[:, None] * N + n[None, :]
        up = tl.load(up_ptrs, mask=(r < RANK)[:, None] & in_n[None, :], other=0.0)
        # A group that has diverged must not reach its neighbours in the tile, and 0 · NaN is NaN: so what is not finite
        # leaves `up` and goes into the group's own rows of `low`, where a select and not a product keeps it apart.
        lost = (up * 0.0).to(tl.float32)
        mine = tl.where((owner == group)[:, None], low + tl.sum(tl.sum(lost, 1), 0).to(low.dtype), 0.0)
        acc = tl.dot(mine, tl.where(lost == 0.0, up, 0.0), acc, input_precision=PRECISION)

    column = part * N + tile_n * BLOCK_N
    x_ptrs = x_ptr + corner * stride_xm + m[:, None] * stride_xm + k[None, :]
    w_ptrs = w_ptr + column.to(tl.int64) * stride_wn + n[None, :] * stride_wn + k[:, None] * stride_wk
    for k0 in range(0, K, BLOCK_K):
        in_k = k < K - k0
        x = tl.load(x_ptrs, mask=here[:, None] if EVEN_K else here[:, None] & in_k[None, :], other=0.0)
        if EVEN_K:
            w = tl.load(w_ptrs) if EVEN_N else tl.load(w_ptrs, mask=in_n[None, :], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    mask = here[:, None] if EVEN_N else here[:, None] & in_n[None, :]
    out = m[:, None] * (PARTS * N) + n[None, :]
    y_corner = corner * (PARTS * N) + column
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column + n) if EVEN_N else tl.load(bias_ptr + column + n, mask=in_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if ACTIVATION != "none":
        acc, slope = _activated(acc, ACTIVATION)
        if KEEP:
            tl.store(slope_ptr + y_corner + out, slope, mask=mask)
    if HAS_RESIDUAL:
        residual = residual_ptr + corner * stride_rm + column + m[:, None] * stride_rm + n[None, :]
        acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_corner + out, acc, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def adapter_gradients_kernel(
    dy_ptr,
    slope_ptr,
    p_ptr,
    b_ptr,
    c_ptr,
    up_ptr,
    du_ptr,
    q_ptr,
    db_ptr,
    dc_ptr,
    chunk_ptr,
    chunks,
    N,
    stride_dym,
    stride_b,
    stride_cs,
    stride_cv,
    stride_cp,
    PARTS: tl.constexpr,
    VIEWS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass over dY for all that the adapters need of it. Grid (chunks of a group's rows, PARTS).

    dU = dY ⊙ slope where there was an activation; Q = dU B'; T = dUᵀ P of the chunk, which goes out as its share of
    dB = T · diag(c) and of dc = Σ_n B ⊙ T. A gate at zero, and so a zero in c, still gets its gradient.

    4·M·parts·N·R FLOP; reads 2·M·parts·N bytes (bf16; twice that with a slope, and writes dU), writes partial
    sums of 4·parts·N·R bytes a chunk, which `sum_chunks_kernel` reads again: each a share of 2·R / BLOCK_M of dY.
    """
    chunk, part = tl.program_id(0), tl.program_id(1)
    group = tl.load(chunk_ptr + chunk).to(tl.int64)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    m, n, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    here, in_r = m < tl.load(chunk_ptr + 2 * chunks + chunk) - start, r < R
    slot, view = group // VIEWS, group % VIEWS
    L: tl.constexpr = PARTS * R
    row_r, here_r = start * L + part * R + (m[:, None] * L + r[None, :]), here[:, None] & in_r[None, :]
    dy_ptrs = dy_ptr + start * stride_dym + part * N + (m[:, None] * stride_dym + n[None, :])
    at_n = m[:, None] * (PARTS * N) + n[None, :]
    slope_ptrs, du_ptrs = slope_ptr, du_ptr
    if HAS_SLOPE:
        corner = start * (PARTS * N) + part * N
        slope_ptrs, du_ptrs = slope_ptr + corner + at_n, du_ptr + corner + at_n
    up_ptrs = up_ptr + (group * L + part * R) * N + (r[None, :] * N + n[:, None])
    b_ptrs = b_ptr + slot * stride_b + part * N * R + (n[:, None] * R + r[None, :])
    db_ptrs = db_ptr + (chunk.to(tl.int64) * PARTS + part) * N * R + (n[:, None] * R + r[None, :])
    p = tl.load(p_ptr + row_r, mask=here_r, other=0.0)
    c = tl.load(c_ptr + slot * stride_cs + view * stride_cv + part * stride_cp + r, mask=in_r, other=0.0)
    c = c.to(tl.float32)
    q = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    dc = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_N):
        in_n = n < N - n0
        mask = here[:, None] if EVEN_N else here[:, None] & in_n[None, :]
        dy = tl.load(dy_ptrs + n0, mask=mask, other=0.0)
        if HAS_SLOPE:
            dy = dy * tl.load(slope_ptrs + n0, mask=mask, other=0.0)
            tl.store(du_ptrs + n0, dy, mask=mask)
        in_b = in_n[:, None] & in_r[None, :]
        up = tl.load(up_ptrs + n0, mask=in_b, other=0.0)
        q = tl.dot(dy, up, q, input_precision=PRECISION)
        t = tl.dot(tl.trans(dy), p, input_precision=PRECISION)
        b = tl.load(b_ptrs + n0 * R, mask=in_b, other=0.0).to(tl.float32)
        dc += tl.sum(t * b, 0)
        tl.store(db_ptrs + n0 * R, t * c[None, :], mask=in_b)
    tl.store(q_ptr + row_r, q, mask=here_r)
    tl.store(dc_ptr + (chunk * PARTS + part) * R + r, dc, mask=in_r)


@triton.jit(do_not_specialize=COUNTS)
def down_gradient_kernel(
    x_ptr,
    q_ptr,
    da_ptr,
    chunk_ptr,
    chunks,
    K,
    stride_xm,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A chunk's share of dA = Qᵀ x. Grid (chunks of a slot's rows, tiles of K); rows go by in steps of BLOCK_M.

    2·M·K·L FLOP; reads 2·M·K bytes of x (bf16), writes 4·L·K a chunk.
    """
    chunk = tl.program_id(0)
    start = tl.load(chunk_ptr + chunks + chunk).to(tl.int64)
    count = (tl.load(chunk_ptr + 2 * chunks + chunk) - start).to(tl.int32)
    m, l, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
    first_k = tl.program_id(1) * BLOCK_K
    in_k, in_l = k < K - first_k, l < L
    x_ptrs = x_ptr + start * stride_xm + first_k + (m[:, None] * stride_xm + k[None, :])
    q_ptrs = q_ptr + start * L + (m[:, None] * L + l[None, :])
    acc = tl.zeros((BLOCK_K, BLOCK_L), dtype=tl.float32)
    for row in range(0, count, BLOCK_M):
        here = m < count - row
        x = tl.load(x_ptrs, mask=here[:, None] if EVEN_K else here[:, None] & in_k[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=here[:, None] & in_l[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), q, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_M * stride_xm
        q_ptrs += BLOCK_M * L
    da_ptr += chunk.to(tl.int64) * L * K + first_k
    tl.store(da_ptr + (l[None, :] * K + k[:, None]), acc, mask=in_k[:, None] & in_l[None, :])


@triton.jit
def _sum_chunks(part_ptr, out_ptr, bounds_ptr, segment, tile, D, BLOCK: tl.constexpr):
    at = tile * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    first, last = tl.load(bounds_ptr + segment), tl.load(bounds_ptr + segment + 1)
    part_ptr += first.to(tl.int64) * D
    for _ in range(first, last):
        acc += tl.load(part_ptr + at, mask=at < D, other=0.0)
        part_ptr += D
    tl.store(out_ptr + segment.to(tl.int64) * D + at, acc, mask=at < D)


@triton.jit(do_not_specialize=COUNTS)
def sum_chunks_kernel(
    da_part_ptr,
    db_part_ptr,
    dc_part_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    a_bounds_ptr,
    b_bounds_ptr,
    c_bounds_ptr,
    slots,
    DA,
    DB,
    DC,
    BLOCK: tl.constexpr,
):
    """dA and dB of every slot and dc of every group from their chunks, first to last: the order that fixes the bits.

    Grid (groups, tiles of DA + tiles of DB + tiles of DC). An empty slot or group gets zeros. Reads 4 bytes a partial
    entry, writes 4 an entry.
    """
    segment, tile = tl.program_id(0), tl.program_id(1)
    tiles_a, tiles_b = tl.cdiv(DA, BLOCK), tl.cdiv(DB, BLOCK)
    if tile < tiles_a:
        if segment < slots:
            _sum_chunks(da_part_ptr, da_ptr, a_bounds_ptr, segment, tile, DA, BLOCK)
    elif tile < tiles_a + tiles_b:
        if segment < slots:
            _sum_chunks(db_part_ptr, db_ptr, b_bounds_ptr, segment, tile - tiles_a, DB, BLOCK)
    else:
        _sum_chunks(dc_part_ptr, dc_ptr, c_bounds_ptr, segment, tile - tiles_a - tiles_b, DC, BLOCK)
