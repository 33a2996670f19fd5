"""Whole iterations of SlotAttention by one launch: what the kernel takes, and when it pays.

An iteration is attention, GRU or sum, and MLP; K rows of a sample depend on no other sample. The op has no derivative:
see pays().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.operator import LIBRARY

NAME = "slot_attention_iterations"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SLOTS = 32
# Padded widths of slots, inputs and hidden layer that tests/test_aot.py has found to fit. 
WIDEST = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 128}


class Weights(NamedTuple):
    """Of an iteration, in the kernel's words; where something is absent its parts are None.

    key (D, E), key_shift (D,), value (D, E), value_shift (D,): what is applied to queries and updates in place of the
    inputs, as layers/slot_attention_inputs.py has it. Without weight_ih the slots take the updates as a sum.
    """

    norm_slots: Tensor | None
    norm_slots_bias: Tensor | None
    query: Tensor
    query_bias: Tensor | None
    key: Tensor | None
    key_shift: Tensor | None
    value: Tensor | None
    value_shift: Tensor | None
    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    norm_mlp: Tensor | None
    norm_mlp_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Options(NamedTuple):
    scale: float
    eps: float
    denominator: bool
    ln_eps: float
    times: int
    return_attn: bool
    dtype: torch.dtype  # of the slots that are returned


def empty(
    slots: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    weights: Sequence[Tensor | None], *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """slots; A of the last iteration, without elements unless it is returned."""
    chosen = Options(*options)
    attn = k.new_empty((*slots.shape[:2], k.shape[1]) if chosen.return_attn else 0)
    return slots.new_empty(slots.shape, dtype=chosen.dtype), attn


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = backends.load("slot_attention", "triton_iterations").run(*args)
    return result


LIBRARY.define(
    f"{NAME}(Tensor slots, Tensor k, Tensor? v, Tensor? slot_mask, Tensor? input_mask, Tensor?[] weights, float scale,"
    " float eps, bool denominator, float ln_eps, int times, bool return_attn, ScalarType dtype)"
    " -> (Tensor updated, Tensor attn)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for key in ("CPU", "CUDA"):
    LIBRARY.impl(NAME, _run, key)
torch.library.register_fake(f"recattn_kernels::{NAME}", empty, lib=LIBRARY)
