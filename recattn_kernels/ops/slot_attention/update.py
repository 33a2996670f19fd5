"""What an iteration of SlotAttention does after its attention as one operation, on a CPU in float32.

For some hundred slots an iteration's dozen operations take longer to call than to compute, most of all in a backward:
see csrc/cpu/slot_update.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.gru_step.reference import gru_step
from recattn_kernels.ops.operator import Operator, Results

NAME = "slot_update"


class Weights(NamedTuple):
    """Of a GRU cell, a layer normalisation and an MLP of one hidden layer of ReLUs."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    norm: Tensor
    norm_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor


def slot_update(updates: Tensor, slots: Tensor, *weights_and_eps: Any) -> tuple[Tensor]:
    """h + MLP(LN(h)), h = GRU(updates, slots): the definition."""
    *tensors, eps = weights_and_eps
    w = Weights(*tensors)
    (h,) = gru_step(F.linear(updates, w.weight_ih, w.bias_ih), F.linear(slots, w.weight_hh, w.bias_hh), slots)
    y = F.layer_norm(h, h.shape[-1:], w.norm, w.norm_bias, eps)
    return (h + F.linear(F.linear(y, w.up, w.up_bias).relu(), w.down, w.down_bias),)


class _Update(Operator):
    def _forward(self, *args: Any) -> Sequence[Tensor]:
        results: Sequence[Tensor] = backends.load("slot_attention", "cpp_update").forward(*args[:-1])
        return results

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        module, eps = backends.load("slot_attention", "cpp_update"), args[self.inputs]
        results: Results = module.backward(grads[0], saved, args[: self.inputs], eps, needs)
        return results


def empty(updates: Tensor, slots: Tensor, *weights_and_eps: Any) -> tuple[Tensor, ...]:
    """The slots; what the backward reads: the GRU's gates of both, y before its scale and shift, its 1 / std, and the
    hidden layer."""
    (R, D), M = slots.shape, weights_and_eps[Weights._fields.index("up")].shape[0]
    return tuple(slots.new_empty(size) for size in ((R, D), (R, 3 * D), (R, 3 * D), (R, D), R, (R, M)))


_KEPT = ("x_gates", "h_gates", "normed", "rstd", "hidden")
OPERATOR = _Update(
    NAME,
    inputs=", ".join(f"Tensor {name}" for name in ("updates", "slots", *Weights._fields)),
    options="float eps",
    outputs=("result",),
    kept=_KEPT,
    saves=_KEPT,
    definition=slot_update,
    empty=empty,
)


def takes(slots: Tensor, weights: Weights) -> bool:
    """Whether the operation runs a call. A compiler is left the single operations, of which it makes its own."""
    if torch.compiler.is_compiling() or backends.under_transform() or torch.is_autocast_enabled("cpu"):
        return False
    if backends.machine_refusal("cpp", slots.device.type) is not None:
        return False
    return slots.dtype == torch.float32 and {(w.dtype, w.device) for w in weights} == {(slots.dtype, slots.device)}


def run(updates: Tensor, slots: Tensor, weights: Weights, eps: float) -> Tensor:
    """The slots (..., D) after updates (..., D). What takes() does not take must not come here."""
    D = slots.shape[-1]
    (result,) = OPERATOR.on("cpp", (updates.reshape(-1, D), slots.reshape(-1, D), *weights), (eps,))
    updated: Tensor = result.view(slots.shape)
    return updated
