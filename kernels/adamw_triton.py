"""The fused AdamW: kernels and launcher. `adamw.py` has the reference and the arguments.

Conventions of the kernels:

- everything but the bias corrections is fp32; axis 0 of a grid is over tiles of a row, axis 1 over the n active rows,
  and row i belongs to slot `slots[i]`;
- a slot is int64 before it is multiplied by a row's length, because slots · D exceeds 2³¹; offsets within a row are
  32-bit;
- there are no atomics: a row's norm is a sum of partial sums in a fixed order, so results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdlp.kernels.adamw import Settings, Stack
from fastdlp.kernels.launch import launch
from fastdlp.kernels.pruning import THRESHOLDS
from fastdlp.kernels.tiles import tile_for

FACTORS = 3  # per row: step sizes of weights and gates with bias correction, and √(1 − β₂ᵗ)


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
    """Increment the rows' steps and write their factors [n, FACTORS]. Grid (n,).

    Reads 24 bytes per row, writes 20; ~50 FLOPs. One warp, so that the thread that stores a count has read it.
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
def row_norms_kernel(grad_ptr, partial_ptr, D, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Σ g² of every chunk of every row of gradients [n, D] → [n, chunks]. Grid (chunks, n).

    Reads 4 bytes per entry, writes 4 per chunk; 2 FLOPs per entry.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k0 in range(0, CHUNK, BLOCK):
        offsets = chunk * CHUNK + k0 + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + row * D + offsets, mask=offsets < D, other=0.0)
        acc += g * g
    tl.store(partial_ptr + row * tl.num_programs(0) + chunk, tl.sum(acc))


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
    partial_ptr,
    D,
    Q,
    partials,
    max_norm,
    weight_decay,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    CLIP: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the rows' weights and gates, in place. Grid (tiles of D + tiles of Q, n).

    Reads parameter, both moments and gradient and writes the first three: 28 bytes per entry, and ~15 FLOPs, 3 more for
    a gate. With CLIP a program also reads its row's partial sums of the norm, 4 bytes each, from L2, once a tile: at
    16,384 entries per sum that is 164 bytes beside 28,672 for D = 668,672 and a BLOCK of 1024.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    factor_ptrs = factor_ptr + row * FACTORS
    root_correction = tl.load(factor_ptrs + 2)
    settings = (root_correction, weight_decay, eps)
    tiles = tl.cdiv(D, BLOCK)
    if tile < tiles:
        scale = 1.0
        if CLIP:
            i = tl.arange(0, BLOCK_PARTIALS)
            squares = tl.sum(tl.load(partial_ptr + row * partials + i, mask=i < partials, other=0.0))
            scale = tl.div_rn(max_norm, tl.sqrt_rn(squares) + 1e-6)
            scale = tl.minimum(scale, 1.0, propagate_nan=tl.PropagateNan.ALL)
        lr, step_size = tl.load(lr_ptr + slot), tl.load(factor_ptrs)
        stack, rates = (weight_ptr, weight_m_ptr, weight_v_ptr, weight_grad_ptr), (lr, step_size, scale, 0.0)
        _step(stack, row, slot, tile, D, rates, settings, BETA1, BETA2, "none", BLOCK)
    else:
        lr, step_size, xi = tl.load(gate_lr_ptr + slot), tl.load(factor_ptrs + 1), tl.load(xi_ptr + slot)
        stack, rates = (gate_ptr, gate_m_ptr, gate_v_ptr, gate_grad_ptr), (lr, step_size, 1.0, xi)
        _step(stack, row, slot, tile - tiles, Q, rates, settings, BETA1, BETA2, THRESHOLD, BLOCK)


@triton.jit
def _step(
    stack,
    row,
    slot,
    tile,
    size,
    rates,
    settings,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one row: gradient · scale, both moments, the parameter, then its threshold."""
    param_ptr, m_ptr, v_ptr, grad_ptr = stack
    lr, step_size, scale, xi = rates
    root_correction, weight_decay, eps = settings
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    offsets = slot * size + columns
    g = tl.load(grad_ptr + row * size + columns, mask=mask, other=0.0) * scale
    m = tl.load(m_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
    p = tl.load(param_ptr + offsets, mask=mask, other=0.0)
    m += (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    p *= 1 - lr * weight_decay
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_correction) + eps)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    tl.store(param_ptr + offsets, _threshold(p, xi, THRESHOLD), mask=mask)


@triton.jit
def _threshold(v, xi, THRESHOLD: tl.constexpr):
    """`soft_threshold` or `reference_threshold`; NaN stays NaN."""
    if THRESHOLD == "soft":
        return tl.where(tl.abs(v) <= xi, 0.0, tl.where(v < 0, v + xi, v - xi))
    elif THRESHOLD == "reference":
        v = tl.where(v > xi, v - xi, v)
        v = tl.where(v < -xi, v + xi, v)
        return tl.where(tl.abs(v) < xi, 0.0, v)
    else:
        return v


def adamw_fused(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """`adamw_reference` in Triton kernels; same arguments. Can be captured in a CUDA graph.

    Raises:
        ValueError: a threshold, a shape or a memory layout that the kernels do not support.
    """
    _check(weights, gates, slots, steps, xi, settings)
    (n, D), Q = weights.grads.shape, gates.grads.shape[1]
    beta1, beta2 = settings.betas
    factors = weights.grads.new_empty(n, FACTORS)
    betas = {"BETA1": beta1, "BETA2": beta2, "FACTORS": FACTORS}
    rates = (weights.lr, gates.lr)
    launch(count_steps_kernel, (n,), slots, steps, *rates, factors, **betas, num_warps=1, num_stages=1)
    partials = _row_norms(weights.grads) if settings.clip_norm > 0 else None
    count = 0 if partials is None else partials.shape[1]
    tile = tile_for("adamw", weights.params.device, 4)
    stacks = [tensor for stack in (weights, gates) for tensor in (stack.params, stack.m, stack.v, stack.grads)]
    launch(
        adamw_kernel,
        (triton.cdiv(D, tile["BLOCK"]) + triton.cdiv(Q, tile["BLOCK"]), n),
        *stacks,
        slots,
        factors,
        *rates,
        xi,
        partials,
        D,
        Q,
        count,
        *map(float, (settings.clip_norm, settings.weight_decay, settings.eps)),  # Triton infers types from Python's
        **betas,
        CLIP=partials is not None,
        THRESHOLD=settings.threshold,
        BLOCK_PARTIALS=max(1, triton.next_power_of_2(count)),
        **tile.launch,
    )


def _row_norms(grads: Tensor) -> Tensor:
    """Σ g² of every chunk of every row: grads [n, D] → [n, chunks]."""
    n, D = grads.shape
    tile = tile_for("row_norms", grads.device, 4)
    partials = grads.new_empty(n, triton.cdiv(D, tile.chunk))
    launch(row_norms_kernel, (partials.shape[1], n), grads, partials, D, CHUNK=tile.chunk, **tile.launch)
    return partials


def _check(weights: Stack, gates: Stack, slots: Tensor, steps: Tensor, xi: Tensor, settings: Settings) -> None:
    """What torch checks in the reference: a kernel does not check bounds."""
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
