"""Adapters on a whole model: replaces its linears by `DualLoRALinear`, and selects the views of all of them.

adapt(model, ["attn", "c_fc", "c_proj"], ranks={"local": 4, "global": 2}, gated=["local"], slots=3)
select(model, "local", "global", sizes=[8, 8, 5])    # 8 + 8, 8 + 8 and 5 + 5 samples: 42 in all
select(model, ("local", "global"))                   # the sum of both for all; each slot has a third of the samples
select(model, ())                                    # the frozen model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdlp.kernels.attention import attention_reference
from fastdlp.kernels.module import DualLoRALinear, LoRABranch, View, frozen_module


class DualLoRAProjection(DualLoRALinear):
    """Replaces a parameter [K, N] of a product `x @ projection`; its weight is the transpose."""


class DualLoRAAttention(nn.Module):
    """Self-attention with separate adapters on q, k, v, and one on the output projection.

    Replaces an `nn.MultiheadAttention`, which packs q, k and v into a bare parameter and uses the weight of its output
    projection without calling the module, so that a replacement of that would be ignored.

    Args:
        attention: batch first, of one width, without dropout; its weights are shared and frozen.
        options: as for `DualLoRALinear`.
    """

    def __init__(self, attention: nn.MultiheadAttention, **options: Any) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn is not supported")
        if not attention.batch_first or attention.dropout:
            raise ValueError("only nn.MultiheadAttention(batch_first=True) without dropout is supported")
        self.heads = attention.num_heads
        self.qkv = DualLoRALinear(frozen_module(attention.in_proj_weight, attention.in_proj_bias), parts=3, **options)
        self.out = DualLoRALinear(attention.out_proj, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[samples, T, width], three times the same tensor → the same shape, None. Masks as nn.MultiheadAttention's."""
        if key is not query or value is not query or query.ndim != 3:
            raise ValueError("DualLoRAAttention: query, key and value must be one tensor [samples, T, width]")
        if key_padding_mask is not None or need_weights:
            raise ValueError("DualLoRAAttention: pass need_weights=False, and masks as attn_mask")
        samples, tokens, width = query.shape
        qkv = self.qkv(query).view(samples, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = None
        if attn_mask is not None:
            mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
            mask = mask if mask.ndim == 2 else mask.view(samples, self.heads, tokens, tokens)
        a = attention_reference(q, k, v, mask)
        return self.out(a.transpose(1, 2).flatten(2)), None

    def merged(self, slot: int = 0, view: View | None = None) -> nn.MultiheadAttention:
        """A plain attention with one slot's branches folded into its weights; None: all branches."""
        qkv, out = self.qkv.merged(slot, view), self.out.merged(slot, view)
        state = {f"in_proj_{name}": tensor for name, tensor in qkv.state_dict().items()}
        state |= {f"out_proj.{name}": tensor for name, tensor in out.state_dict().items()}
        bias = qkv.bias is not None
        attention = nn.MultiheadAttention(qkv.in_features, self.heads, bias=bias, batch_first=True, device="meta")
        attention.load_state_dict(state, assign=True)
        return attention.requires_grad_(False)


def adapt(model: nn.Module, targets: Sequence[str], **options: Any) -> nn.Module:
    """Add adapters to a model, in place, and freeze all its other parameters.

    Args:
        targets: suffixes of the names of what to adapt: each an nn.Linear, an nn.MultiheadAttention, or a parameter
            [K, N] that the model multiplies by from the right (`x @ projection`).
        options: as for `DualLoRALinear`.

    Returns:
        The model. For open_clip's towers: `adapt(net.visual, ["attn", "c_fc", "c_proj", "proj"], ...)`, and
        `adapt(net.transformer, ["attn", "c_fc", "c_proj"], ...)` with `adapt(net, ["text_projection"], ...)`.

    Raises:
        ValueError: a target that the model does not have, or one that cannot be adapted.
    """
    found: dict[str, Any] = {**dict(model.named_modules()), **dict(model.named_parameters())}
    chosen = {target: [name for name in found if f".{name}".endswith(f".{target}")] for target in targets}
    for target, names in chosen.items():
        if not names:
            raise ValueError(f"the model has no module or parameter {target!r}")
    wanted = {name for names in chosen.values() for name in names}
    adapted = {name: _adapted(model, name, found[name], options) for name in found if name in wanted}
    for name, module in adapted.items():
        owner, _, attribute = name.rpartition(".")
        parent = model.get_submodule(owner)
        if isinstance(found[name], nn.Parameter):
            delattr(parent, attribute)
        setattr(parent, attribute, module)
    trained = {id(p) for m in model.modules() if isinstance(m, LoRABranch) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return model


def select(model: nn.Module, *views: View, sizes: Sequence[int] | None = None) -> None:
    """`DualLoRALinear.select` on every adapted linear of a model, for all later calls.

    Under activation checkpointing the backward recomputes the forward: run it before the next `select`.
    """
    for _, layer in _layers(model):
        layer.select(*views, sizes=sizes)


def branch_parameters(model: nn.Module, branch: str) -> dict[str, nn.Parameter]:
    """All parameters of one branch by their names in the model's state, for an optimizer, a file, or FedAvg."""
    return {
        f"{prefix}branches.{branch}.{name}": parameter
        for prefix, layer in _layers(model)
        for name, parameter in layer.branch(branch).named_parameters()
    }


def merge(model: nn.Module, slot: int = 0, view: View | None = None) -> nn.Module:
    """The model without adapters, one slot's branches (None: all) folded into its weights; its children in place.

    It has the modules and state names of the model before `adapt`; all its weights stay frozen.
    """
    if isinstance(model, (DualLoRALinear, DualLoRAAttention)):
        return model.merged(slot, view)
    for name, child in list(model.named_children()):
        if isinstance(child, DualLoRAProjection):
            delattr(model, name)
            weight = child.merged(slot, view).weight
            setattr(model, name, nn.Parameter(weight.T.contiguous(), requires_grad=False))
        else:
            setattr(model, name, merge(child, slot, view))
    return model


def _adapted(model: nn.Module, name: str, target: Any, options: dict[str, Any]) -> nn.Module:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        raise ValueError(f"{name}: {type(owner).__name__} reads its weights itself and would ignore an adapter there")
    if isinstance(target, nn.Linear):
        return DualLoRALinear(target, **options)
    if isinstance(target, nn.MultiheadAttention):
        return DualLoRAAttention(target, **options)
    if isinstance(target, nn.Parameter) and target.ndim == 2:
        return DualLoRAProjection(frozen_module(target.detach().T.contiguous(), None), **options)
    raise ValueError(f"{name} is a {type(target).__name__}: only linears, attentions and matrices carry adapters")


def _layers(model: nn.Module) -> list[tuple[str, DualLoRALinear]]:
    """Every adapted linear with the prefix of its parameters' names."""
    modules = model.named_modules()
    layers = [(f"{name}." if name else "", m) for name, m in modules if isinstance(m, DualLoRALinear)]
    if not layers:
        raise ValueError("the model has no adapted linear: call adapt first")
    return layers
