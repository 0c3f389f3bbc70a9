"""The fused AdamW: its jit code and its launcher. `adamw.py` has the reference, the arguments and their checks.

Conventions of the kernels:

- everything is fp32 but the bias corrections; axis 0 of a grid runs over tiles of a row, axis 1 over the n active rows,
  and row i belongs to slot `slots[i]`;
- a slot is int64 before it meets a row's length, because slots · D passes 2³¹; within a row 32 bits hold every offset;
- nothing is added atomically: a row's norm goes through partial sums and a sum in a fixed order, so every run gives the
  same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.adamw import THRESHOLDS, Settings, Stack
from fastdlp.kernels.launch import launch
from fastdlp.kernels.tiles import tile_for

FACTORS = 3  # of a row: step sizes of weights and gates with their bias correction, and √(1 − β₂ᵗ)


def launch_adamw(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """`adamw_fused` on arguments that were checked."""
    n, D = weights.grads.shape
    Q = gates.grads.shape[1]
    beta1, beta2 = settings.betas
    factors = weights.grads.new_empty(n, FACTORS)
    launch(
        count_steps_kernel,
        (n,),
        slots,
        steps,
        weights.lr,
        gates.lr,
        factors,
        BETA1=beta1,
        BETA2=beta2,
        FACTORS=FACTORS,
        num_warps=1,
        num_stages=1,
    )
    shares = _row_norms(weights.grads) if settings.clip_norm > 0 else None
    count = 0 if shares is None else shares.shape[1]
    tile = tile_for("adamw", weights.params.device, 4)
    launch(
        adamw_kernel,
        (_tiles(D, tile["BLOCK"]) + _tiles(Q, tile["BLOCK"]), n),
        weights.params,
        weights.m,
        weights.v,
        weights.grads,
        gates.params,
        gates.m,
        gates.v,
        gates.grads,
        slots,
        factors,
        weights.lr,
        gates.lr,
        xi,
        shares,
        D,
        Q,
        count,
        float(settings.clip_norm),  # Triton takes an operand's type from Python's
        float(settings.weight_decay),
        float(settings.eps),
        BETA1=beta1,
        BETA2=beta2,
        CLIP=shares is not None,
        THRESHOLD=settings.threshold,
        FACTORS=FACTORS,
        BLOCK_SHARES=1 << max(count - 1, 0).bit_length(),  # the next power of two: what tl.arange takes
        **tile.launch,
    )


def _row_norms(grads: Tensor) -> Tensor:
    """Σ g² of every chunk of every row: grads [n, D] → [n, chunks]."""
    n, D = grads.shape
    tile = tile_for("row_norms", grads.device, 4)
    shares = grads.new_empty(n, _tiles(D, tile.chunk))
    launch(row_norms_kernel, (shares.shape[1], n), grads, shares, D, CHUNK=tile.chunk, **tile.launch)
    return shares


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


@triton.jit
def count_steps_kernel(
    slot_ptr,
    step_ptr,
    lr_ptr,
    gate_lr_ptr,
    factor_ptr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Count the rows' steps and write their factors [n, FACTORS]. Grid (n).

    Reads 24 bytes a row and writes 20. One warp, so that the thread that stores a count is one that has read it.
    """
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    t = tl.load(step_ptr + slot) + 1
    tl.store(step_ptr + slot, t)
    # In fp64, as in the reference: 1 - 0.999^t loses half its digits in fp32 at small t.
    correction = 1 - _power(BETA1, t.to(tl.float64))
    lr, gate_lr = tl.load(lr_ptr + slot).to(tl.float64), tl.load(gate_lr_ptr + slot).to(tl.float64)
    factor_ptrs = factor_ptr + row * FACTORS
    tl.store(factor_ptrs, (lr / correction).to(tl.float32))
    tl.store(factor_ptrs + 1, (gate_lr / correction).to(tl.float32))
    tl.store(factor_ptrs + 2, tl.sqrt(1 - _power(BETA2, t.to(tl.float64))).to(tl.float32))


@triton.jit
def _power(BASE: tl.constexpr, t):
    """BASE^t in fp64."""
    return tl.exp(t * tl.log(tl.full((), BASE, tl.float64)))


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
    factor_ptr,
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
    FACTORS: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the rows' weights and gates, in place. Grid (tiles of D + tiles of Q, n).

    Reads parameter, both moments and gradient and writes the first three:
    28 bytes an entry, and ~15 FLOP, 3 more for a gate. With CLIP a program also reads its row's `shares`, 4 bytes each,
    from L2, once a tile: 16,384 entries a share make that 164 bytes beside 28,672 for D = 668,672 and a BLOCK of 1024.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    factor_ptrs = factor_ptr + row * FACTORS
    root_correction = tl.load(factor_ptrs + 2)
    tiles = tl.cdiv(D, BLOCK)
    if tile < tiles:
        scale = 1.0
        if CLIP:
            s = tl.arange(0, BLOCK_SHARES)
            squares = tl.sum(tl.load(share_ptr + row * shares + s, mask=s < shares, other=0.0))
            scale = tl.div_rn(max_norm, tl.sqrt_rn(squares) + 1e-6)
            scale = tl.minimum(scale, 1.0, propagate_nan=tl.PropagateNan.ALL)
        lr, step_size = tl.load(lr_ptr + slot), tl.load(factor_ptrs)
        _step(
            weight_ptr,
            weight_m_ptr,
            weight_v_ptr,
            weight_grad_ptr,
            row,
            slot,
            tile,
            D,
            lr,
            step_size,
            root_correction,
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
        lr, step_size, xi = tl.load(gate_lr_ptr + slot), tl.load(factor_ptrs + 1), tl.load(xi_ptr + slot)
        _step(
            gate_ptr,
            gate_m_ptr,
            gate_v_ptr,
            gate_grad_ptr,
            row,
            slot,
            tile - tiles,
            Q,
            lr,
            step_size,
            root_correction,
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
    lr,
    step_size,
    root_correction,
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
    p *= 1 - lr * weight_decay
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps)
    tl.store(m_ptr + of_slot, m, mask=here)
    tl.store(v_ptr + of_slot, v, mask=here)
    tl.store(param_ptr + of_slot, _thresholded(p, xi, THRESHOLD), mask=here)


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


def adamw_fused(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """`adamw_reference` in the Triton form; same arguments. Can be captured in a CUDA graph.

    Raises:
        ValueError: a threshold, a shape or a memory layout that the kernels do not take.
    """
    _check(weights, gates, slots, steps, xi, settings)
    launch_adamw(weights, gates, slots, steps, xi, settings)


def _check(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """What torch checks in the reference: a kernel reads wherever it is sent."""
    if settings.threshold not in THRESHOLDS:
        raise ValueError(f"adamw: unknown threshold {settings.threshold!r}: choose from {', '.join(THRESHOLDS)}")
    count, fp32 = len(steps), torch.float32
    expected: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "slots": (slots, (len(slots),), torch.int64),
        "steps": (steps, (count,), torch.int64),
        "xi": (xi, (count,), fp32),
    }
    for name, stack in (("weights", weights), ("gates", gates)):
        width = stack.params.shape[-1]
        expected |= {f"{name}.{field}": (getattr(stack, field), (count, width), fp32) for field in ("params", "m", "v")}
        expected[f"{name}.lr"] = (stack.lr, (count,), fp32)
        expected[f"{name}.grads"] = (stack.grads, (len(slots), width), fp32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"adamw: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
        if tensor.device != steps.device or not tensor.is_contiguous():
            raise ValueError(f"adamw: {name} must be contiguous and on {steps.device}, the device of steps")
