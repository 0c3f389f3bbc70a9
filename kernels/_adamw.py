"""The jit code of the fused AdamW. `adamw.py` launches it, and has its reference and its arguments.

Conventions of both kernels:

- everything is fp32 but the bias corrections; axis 0 of a grid runs over tiles of a row, axis 1 over the n active rows,
  and row i belongs to slot `slots[i]`;
- a slot is int64 before it meets a row's length, because slots · D passes 2³¹; within a row 32 bits hold every offset;
- nothing is added atomically: a row's norm goes through partial sums and a sum in a fixed order, so every run gives the
  same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_norms_kernel(grad_ptr, share_ptr, D, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Σ g² of every chunk of every row of gradients [n, D], to shares [n, chunks]. Grid (chunks, n).

    Reads 4 bytes an entry, writes 4 a chunk; 2 FLOP an entry.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k0 in range(0, CHUNK, BLOCK):
        at = chunk * CHUNK + k0 + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + row * D + at, mask=at < D, other=0.0)
        acc += g * g
    tl.store(share_ptr + row * tl.num_programs(0) + chunk, tl.sum(acc))


@triton.jit
def adamw_kernel(
    weight_ptr,
    weight_m_ptr,
    weight_v_ptr,
    weight_grad_ptr,
    gate_ptr,
    gate_m_ptr,
    gate_v_ptr,
    gate_grad_ptr,
    slot_ptr,
    step_ptr,
    lr_ptr,
    gate_lr_ptr,
    xi_ptr,
    share_ptr,
    D,
    Q,
    shares,
    max_norm,
    weight_decay,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    CLIP: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the rows' weights and gates, in place. Grid (tiles of D + tiles of Q, n).

    `steps` counts the step that is being made. Reads parameter, both moments and gradient and writes the first three:
    28 bytes an entry, and ~15 FLOP, 3 more for a gate. With CLIP a program also reads its row's `shares`, 4 bytes each,
    from L2, once a tile: 16,384 entries a share make that 164 bytes beside 28,672 for D = 668,672 and a BLOCK of 1024.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    t = tl.load(step_ptr + slot).to(tl.float64)
    tiles = tl.cdiv(D, BLOCK)
    if tile < tiles:
        scale = 1.0
        if CLIP:
            s = tl.arange(0, BLOCK_SHARES)
            squares = tl.sum(tl.load(share_ptr + row * shares + s, mask=s < shares, other=0.0))
            scale = tl.div_rn(max_norm, tl.sqrt_rn(squares) + 1e-6)
            scale = tl.minimum(scale, 1.0, propagate_nan=tl.PropagateNan.ALL)
        lr = tl.load(lr_ptr + slot)
        _step(
            weight_ptr,
            weight_m_ptr,
            weight_v_ptr,
            weight_grad_ptr,
            row,
            slot,
            tile,
            D,
            t,
            lr,
            scale,
            0.0,
            weight_decay,
            eps,
            BETA1,
            BETA2,
            "none",
            BLOCK,
        )
    else:
        lr, xi = tl.load(gate_lr_ptr + slot), tl.load(xi_ptr + slot)
        _step(
            gate_ptr,
            gate_m_ptr,
            gate_v_ptr,
            gate_grad_ptr,
            row,
            slot,
            tile - tiles,
            Q,
            t,
            lr,
            1.0,
            xi,
            weight_decay,
            eps,
            BETA1,
            BETA2,
            THRESHOLD,
            BLOCK,
        )


@triton.jit
def _step(
    param_ptr,
    m_ptr,
    v_ptr,
    grad_ptr,
    row,
    slot,
    tile,
    size,
    t,
    lr,
    scale,
    xi,
    weight_decay,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one row: gradient · scale, both moments, the parameter, then its threshold."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    grad_ptrs, of_slot = grad_ptr + row * size + at, slot * size + at
    g = tl.load(grad_ptrs, mask=here, other=0.0) * scale
    m = tl.load(m_ptr + of_slot, mask=here, other=0.0)
    v = tl.load(v_ptr + of_slot, mask=here, other=0.0)
    p = tl.load(param_ptr + of_slot, mask=here, other=0.0)
    m += (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    # In fp64, as in the reference: 1 - 0.999^t loses half its digits in fp32 at small t.
    step_size = (lr.to(tl.float64) / (1 - _power(BETA1, t))).to(tl.float32)
    root_correction = tl.sqrt(1 - _power(BETA2, t)).to(tl.float32)
    p *= 1 - lr * weight_decay
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps)
    tl.store(m_ptr + of_slot, m, mask=here)
    tl.store(v_ptr + of_slot, v, mask=here)
    tl.store(param_ptr + of_slot, _thresholded(p, xi, THRESHOLD), mask=here)


@triton.jit
def _power(BASE: tl.constexpr, t):
    """BASE^t in fp64."""
    return tl.exp(t * tl.log(tl.full((), BASE, tl.float64)))


@triton.jit
def _thresholded(v, xi, THRESHOLD: tl.constexpr):
    """`soft_threshold` or `reference_threshold`; what is not a number stays so."""
    if THRESHOLD == "soft":
        return tl.where(tl.abs(v) <= xi, 0.0, tl.where(v < 0, v + xi, v - xi))
    elif THRESHOLD == "reference":
        v = tl.where(v > xi, v - xi, v)
        v = tl.where(v < -xi, v + xi, v)
        return tl.where(tl.abs(v) < xi, 0.0, v)
    else:
        return v
