"""What the launches of rnn, lstm and gru in Triton share: the step kernels' configurations, and arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.gated.contract import KEPT, Call, Kept, reads_output
from recattn_kernels.ops.gated.products import norm_width
from recattn_kernels.strides import contiguous, contiguous_rows
from recattn_kernels.triton_launch import Launch, Machine, strided


class Config(NamedTuple):
    rows: int
    units: int
    inner: int  # of a product at a time
    num_warps: int  # of 32 lanes
    num_stages: int = 1


REGISTERS = 255
# One product's blocks of a step kernel, by the bytes of a weight: the first of which every multiprocessor has one, else
# the last. Large ones read weights and states less often; but a step that is short of programs waits for its loads, and
# gets more of them in flight from more programs. An estimate, as nothing has run on a GPU.
STEP = {
    2: (Config(64, 32, 64, 8, 3), Config(32, 32, 64, 4, 3), Config(16, 32, 64, 4, 3), Config(16, 16, 64, 4, 3)),
    4: (Config(32, 32, 32, 8, 3), Config(16, 16, 32, 4, 3)),
}
# Where rows of weights do not start at multiples of 16 bytes, and elements are loaded one by one.
UNALIGNED_STEP = Config(16, 16, 32, 4)
# The interpreter's, so small that the tests' samples are several blocks.
INTERPRETER_STEP = Config(16, 16, 16, 4)


LAYER_NORM = ("ln_weight", "ln_bias", "ln_c_weight", "ln_c_bias")


def precision(weight_hh: Tensor) -> str:
    """How float32 is multiplied: exactly, unless torch's own products are allowed TF32."""
    if weight_hh.device.type == "cpu":
        return "interpreted"
    return "tf32" if weight_hh.dtype == torch.float32 and backends.allows_tf32() else "ieee"


def step_grid(call: Call, chosen: Config, width: int) -> tuple[int, int]:
    return triton.cdiv(call.sizes[1], chosen.rows), triton.cdiv(width, chosen.units)


def step_config(call: Call, on: Machine, width: int) -> Config:
    if on.interpreted:
        return INTERPRETER_STEP
    if call.sizes[2] % 8 != 0:
        return UNALIGNED_STEP
    table = STEP[call.weight_hh.element_size()]
    filling = (chosen for chosen in table if math.prod(step_grid(call, chosen, width)) >= on.multiprocessors)
    return next(filling, table[-1])


def arguments(call: Call, chosen: Config) -> dict[str, Any]:
    """What the kernels of both directions take."""
    T, B, H = call.sizes
    rate_h, rate_c = call.mixing
    args = {
        "weight_hh_ptr": call.weight_hh.contiguous(), "lengths_ptr": contiguous(call.lengths), "T": T, "B": B, "H": H,
        "zoneout_h": rate_h or None, "zoneout_c": rate_c or None, "CELL": call.cell, "GATES": call.gates,
        "KEPT": KEPT[call.cell], "REVERSE": call.reverse, "PRECISION": precision(call.weight_hh),
        "BLOCK_B": chosen.rows, "BLOCK_H": chosen.units,
        **{f"{name}_ptr": contiguous(getattr(call, name)) for name in LAYER_NORM},
    }  # fmt: skip
    for name, mask in (("reset", call.reset), ("keep_h", call.keep_h), ("keep_c", call.keep_c)):
        rows = mask if mask is None or name == "reset" else contiguous_rows(mask)
        args |= strided(name, None if rows is None else rows.view(torch.uint8), call.time)
    return args


def forward_arguments(call: Call, output: Tensor, kept: Kept) -> dict[str, Any]:
    """What the forward kernels take beside arguments()."""
    return {
        "bias_hh_ptr": contiguous(call.bias_hh), "gates_ptr": unless_empty(kept.gates),
        "cells_ptr": unless_empty(kept.cells), "normed_ptr": unless_empty(kept.normed),
        "rstd_ptr": unless_empty(kept.rstd),
        **strided("x", contiguous_rows(call.x), call.time), **strided("output", output, call.time),
    }  # fmt: skip


def unless_empty(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() > 0 else None


def backward_arguments(grad_output: Tensor | None, call: Call, kept: Kept, dx: Tensor, dq: Tensor) -> dict[str, Any]:
    """What the backward kernels take beside arguments()."""
    _, B, H = call.sizes
    width = KEPT[call.cell] * H
    output = contiguous_rows(call.x)
    gates = {"gates_ptr": kept.gates, "gates_stride_t": B * width, "gates_stride_b": width}
    return {
        "h0_ptr": contiguous(call.h0), "c0_ptr": contiguous(call.c0), "cells_ptr": unless_empty(kept.cells),
        "normed_ptr": unless_empty(kept.normed), "rstd_ptr": unless_empty(kept.rstd), "grad_clip": call.grad_clip,
        **(strided("gates", output, call.time) if reads_output(call) else gates),
        **strided("grad_output", None if grad_output is None else contiguous_rows(grad_output), call.time),
        **strided("output", output, call.time), **strided("dx", None if dx is dq else dx, call.time),
        **strided("dq", dq, call.time),
    }  # fmt: skip


def step_launch(kernel: Any, call: Call, on: Machine, own: dict[str, Any], width: int | None = None) -> Launch:
    """Over a grid of blocks of rows, and of units or of `width`."""
    H = call.sizes[2]
    width = H if width is None else width
    chosen = step_config(call, on, width)
    given = arguments(call, chosen) | {"BLOCK_K": chosen.inner, "ALIGNED": H % 8 == 0, "i": 0} | own
    args = {name: given[name] for name in kernel.arg_names}
    grid, num_warps = step_grid(call, chosen, width), chosen.num_warps * 32 // on.lanes
    return Launch(kernel, grid, args, num_warps, REGISTERS, chosen.num_stages)


def empty_sums(call: Call) -> Tensor:
    """Of each row, the gradients of LAYER_NORM, side by side; zeros."""
    width = norm_width(call) if call.ln_weight is not None else 0
    return call.x.new_zeros((call.sizes[1], width), dtype=torch.float32)


def float_state(call: Call, initial: Tensor | None) -> Tensor:
    """A float32 copy of a state (B, H), zeros without one, for the step kernels to work in."""
    state = call.x.new_empty(call.sizes[1:], dtype=torch.float32)
    return state.zero_() if initial is None else state.copy_(initial)
