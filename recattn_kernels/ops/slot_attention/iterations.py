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
from recattn_kernels.ops import gpu
from recattn_kernels.ops.autograd import needs_grad
from recattn_kernels.ops.operator import LIBRARY

NAME = "slot_attention_iterations"
# What finds registers, as tests/test_aot.py has it: a sample's slots, padded to 16 or 32, times their features or the
# inputs'. float32 is multiplied exactly, which takes many times those of matrix units.
MOST = {torch.float32: 1024, torch.bfloat16: 2048, torch.float16: 2048}
MOST_SLOTS = 32 if torch.version.hip is None else 16
MOST_INPUTS = 1024
LAUNCH = 100_000  # bytes, see pays()


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


def refusal(slots: Tensor, k: Tensor, v: Tensor | None, weights: Weights) -> str | None:
    """Why one launch cannot take the iterations of a call, or would be no faster; None: it can."""
    reason: str | None = backends.machine_refusal("triton", slots.device.type)
    if reason is not None:
        return reason
    if backends.under_transform():
        return backends.UNDER_TRANSFORM
    if needs_grad((slots, k, v, *weights)):
        return "it keeps nothing for a gradient"
    if k.dim() != 3:
        return "it has one head"
    if k.dtype not in MOST:
        return f"it computes in float32, the inputs are {_name(k.dtype)}"
    (_, K, D), E, M = slots.shape, k.shape[2], weights.up.shape[0]
    if not surely(K <= MOST_SLOTS):
        return f"it holds at most {MOST_SLOTS} slots"
    if D % 16 != 0 or E % 16 != 0 or M % 16 != 0:
        return f"it takes widths in multiples of 16, got {D}, {E} and {M}"
    widest = MOST[k.dtype] // (16 if surely(K <= 16) else 32)
    if max(D, E) > widest:
        return f"of so many slots it holds at most {widest} features in {_name(k.dtype)}, got {max(D, E)}"
    return None if pays(slots, k, v, weights) else "its one program a sample would read for longer than launches take"


def pays(slots: Tensor, k: Tensor, v: Tensor | None, weights: Weights) -> bool:
    """Whether one launch is faster than one for every operation. An estimate: no GPU has measured it yet.

    An iteration is 12 launches: two layer norms, q, attention with its second pass, the GRU's two products and its
    step, the MLP's two products and ReLU, the sum. Absorbed projections add 5 (two products, the logits' bias and its
    scale, the shift); a sum in the GRU's place takes 2 off. Each costs some 2.5 us of latency, in which one
    multiprocessor reads about 100 KB from the L2 cache (LAUNCH). What is fused reads no less from memory, k and v once
    an iteration either way; but every sample's program reads all of the weights (W bytes) for itself, one sample after
    another where there are more than multiprocessors, and one sample's inputs (X bytes) are no longer divided among
    them. Of slots D = 64, 1024 inputs, MLP 128 and bfloat16 W = 108 KB and X = 131 KB against 1.6 MB of launches, up to
    13 samples on each multiprocessor; of D = 128 W = 364 KB and X = 262 KB, up to 3.

    Where a gradient is needed nothing would be gained. The backward of an iteration wants q, the updates, the gates,
    both normalised slots and the hidden layer, which one launch does not leave behind: it would begin with the same 12
    to 17 launches, and the fused forward would come on top of them.
    """
    (B, _, _), (_, N, E) = slots.shape, k.shape
    sums = weights.weight_ih is None
    saved = 12 + 5 * (weights.key is not None) - 2 * sums - 1
    of_weights = sum(w.numel() * w.element_size() for w in weights if w is not None)
    of_inputs = N * E * k.element_size() * (1 if v is None else 2)
    rounds = (B + _multiprocessors(slots.device.index) - 1) // _multiprocessors(slots.device.index)
    return surely(N <= MOST_INPUTS) and surely(rounds * of_weights + of_inputs <= saved * LAUNCH)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def surely(condition: bool) -> bool:
    """condition, for any size: compiled for one side of a rule on sizes that change, a graph takes no other."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return condition


@backends.constant_when_compiled
def _multiprocessors(index: int | None) -> int:
    return 1 if index is None else gpu.gpu_of(torch.device("cuda", index)).multiprocessors


def run(
    slots: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None, weights: Weights,
    options: Options,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The slots after options.times iterations, and the A of the last. What refusal() refuses must not come here."""
    args = (slots, k, v, slot_mask, input_mask, list(weights), *options)
    op = torch.ops.recattn_kernels.slot_attention_iterations.default
    updated, attn = (op if backends.dispatches(slots, k) else _run)(*args)
    return updated, attn if options.return_attn else None


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
