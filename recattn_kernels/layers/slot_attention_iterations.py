"""The iterations of SlotAttention in one launch, or what follows their attention in one operation, where what stands
in the layer is what these compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recattn_kernels.layers.autocast import autocasts
from recattn_kernels.layers.gated_cell import GRUCell
from recattn_kernels.layers.projection import COMPILED
from recattn_kernels.layers.slot_attention_inputs import Attention, is_plain
from recattn_kernels.ops.slot_attention import iterations, update
from recattn_kernels.ops.slot_attention.iterations import Options, Weights

if TYPE_CHECKING:
    from recattn_kernels.layers.slot_attention import SlotAttention

Masks = tuple[Tensor | None, Tensor | None]  # of slots, of inputs


def fused(
    layer: SlotAttention,
    attention: Attention,
    slots: Tensor,
    times: int,
    return_attn: bool,
    masks: Masks,
    backend: str,
) -> tuple[Tensor, Tensor | None] | None:
    """The slots after that many iterations, and A; None where the layer goes through them operation by operation."""
    if times == 0 or backend not in ("auto", "triton") or (slots.device.type == "cpu" and backend == "auto"):
        return None
    weights, dtype = weights_of(layer, attention), _dtype(layer, slots)
    if weights is None or dtype is None or iterations.refusal(slots, attention.k, attention.v, weights) is not None:
        return None
    options = Options(
        attention.scale, layer.eps, layer.eps_mode == "denominator", layer.norm_slots.eps, times, return_attn, dtype
    )  # fmt: skip
    return iterations.run(slots, attention.k, attention.v, *masks, weights, options)


def weights_of(layer: SlotAttention, attention: Attention) -> Weights | None:
    """None where an iteration of the layer is more, or other, than its formula."""
    norms, q, mlp = (layer.norm_slots, layer.norm_mlp), layer.project_q, _mlp(layer)
    if layer.heads > 1 or not all(is_plain(norm, nn.LayerNorm) for norm in norms) or not is_plain(q, nn.Linear):
        return None
    if mlp is None or norms[0].eps != norms[1].eps or any(norm.normalized_shape != (layer.dim,) for norm in norms):
        return None
    of_gru: tuple[Any, ...] | None = (None, None, None, None) if layer.gru is None else _gru(layer)
    if of_gru is None:
        return None
    up, down = mlp
    parts: tuple[Any, ...] = (
        norms[0].weight, norms[0].bias, q.weight, q.bias, *attention.absorbed, *of_gru, norms[1].weight, norms[1].bias,
        up.weight, up.bias, down.weight, down.bias,
    )  # fmt: skip
    return Weights(*parts) if len({w.dtype for w in parts if w is not None}) == 1 else None


def update_weights(layer: SlotAttention, slots: Tensor, backend: str) -> update.Weights | None:
    """What ops/slot_attention/update.py takes of the layer; None where it does not take the call."""
    norm, mlp, of_gru = layer.norm_mlp, _mlp(layer), _gru(layer)
    if backend not in COMPILED or mlp is None or of_gru is None or not is_plain(norm, nn.LayerNorm):
        return None
    up, down = mlp
    parts = (*of_gru, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias)
    if any(w is None for w in parts) or norm.normalized_shape != (layer.dim,):
        return None
    weights = update.Weights(*parts)
    return weights if update.takes(slots, weights) else None


def _gru(layer: SlotAttention) -> tuple[Tensor, ...] | None:
    """The weights of the layer's GRU, where it is one and nothing more."""
    gru = layer.gru
    if gru is None or not is_plain(gru, GRUCell) or not gru.bias or gru._extras() or gru.backend != layer.backend:
        return None
    return gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh


def _mlp(layer: SlotAttention) -> tuple[nn.Linear, nn.Linear] | None:
    """The two layers of the layer's MLP, where it is one and nothing more."""
    mlp = layer.mlp
    if not is_plain(mlp, nn.Sequential) or len(mlp) != 3:
        return None
    up, relu, down = mlp
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and is_plain(relu, nn.ReLU)):
        return None
    return (up, down) if is_plain(up, nn.Linear) and is_plain(down, nn.Linear) else None


def _dtype(layer: SlotAttention, slots: Tensor) -> torch.dtype | None:
    """Of the slots after an iteration of the layer's own operations; None where that is up to every one of them."""
    if not autocasts(slots):
        return slots.dtype
    if layer.gru is None:
        return slots.dtype if slots.dtype == torch.float32 else None
    # As torch.nn.GRUCell on each.
    return slots.dtype if slots.device.type == "cpu" else torch.get_autocast_dtype(slots.device.type)
