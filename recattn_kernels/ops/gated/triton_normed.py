"""rnn, lstm and gru with layer normalisation in Triton, where one program cannot hold weight_hh: two launches a step.

A row's gates are normalised together, by a program that has all of them: those of the largest rows take as many threads
as a program may have, and what then does not fit in registers goes to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from recattn_kernels.ops.gated.contract import Call, Kept
from recattn_kernels.ops.gated.triton_arguments import (
    REGISTERS,
    Config,
    arguments,
    backward_arguments,
    float_state,
    forward_arguments,
    step_launch,
)
from recattn_kernels.ops.gated.triton_normed_kernels import (
    backward_normed_kernel,
    backward_product_kernel,
    forward_normed_kernel,
    forward_product_kernel,
)
from recattn_kernels.triton_launch import Launch, Machine, run_steps

VALUES = 2  # of a tile for each thread
WARPS = (2, 32)  # at least, and at most


def row_config(call: Call, on: Machine) -> Config:
    units = max(16, triton.next_power_of_2(call.sizes[2]))
    fewest, most = WARPS
    rows = 4 if on.interpreted else max(1, fewest * 32 * VALUES // units)
    return Config(rows, units, 0, min(most, max(fewest, rows * units // (32 * VALUES))))


def row_launch(kernel: Any, call: Call, on: Machine, own: dict[str, Any]) -> Launch:
    chosen = row_config(call, on)
    given = arguments(call, chosen) | {"i": 0} | own
    args = {name: given[name] for name in kernel.arg_names}
    registers = min(REGISTERS, 2**16 // (32 * chosen.num_warps))
    grid = (triton.cdiv(call.sizes[1], chosen.rows),)
    return Launch(kernel, grid, args, chosen.num_warps * 32 // on.lanes, registers)


def forward_step(
    call: Call, output: Tensor, kept: Kept, h: Tensor, c: Tensor | None, on: Machine
) -> tuple[Launch, Launch]:
    """The launches of the first step. h, c (B, H): where the states are kept current."""
    width = call.gates * call.sizes[2]
    own = forward_arguments(call, output, kept) | {
        "products_ptr": h.new_empty((h.shape[0], width)), "h_ptr": h, "c_ptr": c,
    }  # fmt: skip
    return step_launch(forward_product_kernel, call, on, own, width), row_launch(forward_normed_kernel, call, on, own)


def forward(call: Call, output: Tensor, h_n: Tensor, c_n: Tensor, kept: Kept, on: Machine) -> None:
    h, c = float_state(call, call.h0), float_state(call, call.c0) if call.has_c else None
    run_steps(forward_step(call, output, kept, h, c, on), call.sizes[0])
    h_n.copy_(h)
    if c is not None:
        c_n.copy_(c)


def backward_step(
    grad_output: Tensor | None, call: Call, kept: Kept, dx: Tensor, dq: Tensor, dh: Tensor, dc: Tensor | None,
    sums: Tensor, on: Machine,
) -> tuple[Launch, Launch]:  # fmt: skip
    """The launches of the last step. dh, dc (B, H): where the gradients of the states are kept up to date."""
    own = backward_arguments(grad_output, call, kept, dx, dq) | {
        "dh_ptr": dh, "dc_ptr": dc, "sums_ptr": sums,
    }  # fmt: skip
    return row_launch(backward_normed_kernel, call, on, own), step_launch(backward_product_kernel, call, on, own)


def backward(
    grads: Sequence[Tensor | None], call: Call, kept: Kept, results: tuple[Tensor, ...], dq: Tensor, sums: Tensor,
    on: Machine,
) -> None:  # fmt: skip
    """The gradients of x and of the initial states, dq, and sums: of each row, the gradients of the layer norm."""
    grad_output, grad_h_n, grad_c_n = grads
    dx, _, dh0, dc0 = results[:4]
    dh, dc = float_state(call, grad_h_n), float_state(call, grad_c_n) if call.has_c else None
    run_steps(backward_step(grad_output, call, kept, dx, dq, dh, dc, sums, on), call.sizes[0])
    if call.h0 is not None:
        dh0.copy_(dh)
    if call.c0 is not None and dc is not None:
        dc0.copy_(dc)
