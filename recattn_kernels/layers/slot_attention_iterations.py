"""The iterations of SlotAttention in one launch, where what stands in the layer is what that launch computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recattn_kernels.layers.autocast import autocasts
from recattn_kernels.layers.gated_cell import GRUCell
from recattn_kernels.layers.slot_attention_inputs import Attention, is_plain
from recattn_kernels.ops.slot_attention import iterations
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
    norms, gru, mlp = (layer.norm_slots, layer.norm_mlp), layer.gru, layer.mlp
    plain = [(norm, nn.LayerNorm) for norm in norms] + [(layer.project_q, nn.Linear), (mlp, nn.Sequential)]
    if layer.heads > 1 or not all(is_plain(*part) for part in plain) or len(mlp) != 3:
        return None
    up, relu, down = mlp
    if not (is_plain(up, nn.Linear) and is_plain(relu, nn.ReLU) and is_plain(down, nn.Linear)):
        return None
    if norms[0].eps != norms[1].eps or any(norm.normalized_shape != (layer.dim,) for norm in norms):
        return None
    of_gru: tuple[Any, ...] = (None, None, None, None)
    if gru is not None:
        if not is_plain(gru, GRUCell) or not gru.bias or gru._extras() or gru.backend != layer.backend:
            return None
        of_gru = gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh
    q = layer.project_q
    parts: tuple[Any, ...] = (
        norms[0].weight, norms[0].bias, q.weight, q.bias, *attention.absorbed, *of_gru, norms[1].weight, norms[1].bias,
        up.weight, up.bias, down.weight, down.bias,
    )  # fmt: skip
    return Weights(*parts) if len({w.dtype for w in parts if w is not None}) == 1 else None


def _dtype(layer: SlotAttention, slots: Tensor) -> torch.dtype | None:
    """Of the slots after an iteration of the layer's own operations; None where that is up to every one of them."""
    if not autocasts(slots):
        return slots.dtype
    if layer.gru is None:
        return slots.dtype if slots.dtype == torch.float32 else None
    # As torch.nn.GRUCell on each.
    return slots.dtype if slots.device.type == "cpu" else torch.get_autocast_dtype(slots.device.type)
