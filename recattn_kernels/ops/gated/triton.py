"""rnn, lstm and gru in Triton: which kernels run a call, and what they are given.

The products are taken in weight_hh's type and summed in float32. What has no dependence on time, the gradients of
weight_hh and bias_hh, is left to torch, over all steps at once; but the kernels sum those of a layer norm, whose bias
has bias_hh's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.gated import triton_normed as normed
from recattn_kernels.ops.gated.contract import Call, Kept, empty_backward, empty_forward
from recattn_kernels.ops.gated.products import norm_gradients, q_gradient, weight_gradient
from recattn_kernels.ops.gated.triton_arguments import (
    REGISTERS,
    Config,
    arguments,
    backward_arguments,
    empty_sums,
    float_state,
    forward_arguments,
    precision,
    step_launch,
)
from recattn_kernels.ops.gated.triton_sequence_kernels import backward_sequence_kernel, forward_sequence_kernel
from recattn_kernels.ops.gated.triton_step_kernels import (
    backward_reset_kernel,
    backward_step_kernel,
    forward_reset_kernel,
    forward_step_kernel,
)
from recattn_kernels.strides import contiguous
from recattn_kernels.triton_launch import Launch, Machine, guard, machine, run_steps

FEW_ROWS = 4  # of a sequence kernel's program whose products take no matrix unit


def sequence_config(call: Call) -> Config:
    _, _, H = call.sizes
    units = max(16, triton.next_power_of_2(H))
    # Rows: the least that a matrix unit takes. Without one (float32) each is work of its own.
    rows = FEW_ROWS if call.weight_hh.dtype == torch.float32 and precision(call.weight_hh) != "tf32" else 16
    return Config(rows, units, units, 4 if units <= 32 else 8)


LARGE = 2**16  # bytes of weights from which the sequence kernels are short of registers


def weight_bytes(call: Call) -> int:
    """What a sequence kernel keeps on chip."""
    return call.gates * sequence_config(call).units ** 2 * call.weight_hh.element_size()


def holds_weights(call: Call, on: Machine) -> bool:
    """Whether one program takes all steps of its rows: where weight_hh fits on chip, and nothing spills.

    An estimate of what is fastest, as nothing has run on a GPU: large batches may be better off with the step kernels,
    whose blocks are larger, from smaller sizes on.
    """
    if call.sizes[0] == 0:
        return False  # nor is there anything to launch, with what is kept of no step absent
    chosen, weights = sequence_config(call), weight_bytes(call)
    if call.ln_weight is not None and chosen.rows > FEW_ROWS:
        return False  # the sums of the layer norm's gradients find no registers beside what matrix units are given
    units = chosen.units
    options = (call.reset, call.lengths, call.keep_h, call.keep_c, call.grad_clip)
    plain = all(option is None for option in options) and not any(call.mixing)
    roomy = weights <= LARGE or (plain and call.sizes[2] == units and call.weight_hh.element_size() == 2)
    # The weights pass through shared memory, and what is exchanged between the lanes in a step stays beside them.
    return units <= 128 and roomy and weights * 9 // 8 + 2**13 <= on.shared


def sequence_launch(kernel: Any, call: Call, on: Machine, own: dict[str, Any]) -> Launch:
    chosen = sequence_config(call)
    given = arguments(call, chosen) | own
    given |= {"EXACT": call.sizes[2] == chosen.units, "AHEAD": weight_bytes(call) <= LARGE}
    args = {name: given[name] for name in kernel.arg_names}
    return Launch(
        kernel, (triton.cdiv(call.sizes[1], chosen.rows),), args, chosen.num_warps * 32 // on.lanes, REGISTERS
    )


def forward_sequence(call: Call, output: Tensor, h_n: Tensor, c_n: Tensor, kept: Kept, on: Machine) -> Launch:
    own = {
        "h0_ptr": contiguous(call.h0), "c0_ptr": contiguous(call.c0), "h_n_ptr": h_n,
        "c_n_ptr": c_n if call.has_c else None,
    }  # fmt: skip
    return sequence_launch(forward_sequence_kernel, call, on, forward_arguments(call, output, kept) | own)


def forward_step(
    call: Call, output: Tensor, kept: Kept, states: Tensor, c: Tensor | None, on: Machine
) -> tuple[Launch, ...]:
    """The launches of the first step. states (2, B, H): where h goes to and fro; c (B, H): where c is kept current."""
    before = call.cell == "gru_before"
    own = forward_arguments(call, output, kept) | {
        "states_ptr": states, "c_ptr": c, "reset_state_ptr": torch.empty_like(states) if before else None,
    }  # fmt: skip
    kernels = (forward_reset_kernel, forward_step_kernel) if before else (forward_step_kernel,)
    return tuple(step_launch(kernel, call, on, own) for kernel in kernels)


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    output, h_n, c_n, kept = empty_forward(call, keep)
    if h_n.numel() == 0:
        return output, h_n, c_n, kept
    T, on = call.sizes[0], machine(output)
    with guard(output):
        if holds_weights(call, on):
            forward_sequence(call, output, h_n, c_n, kept, on).run()
            return output, h_n, c_n, kept
        if call.ln_weight is not None:
            normed.forward(call, output, h_n, c_n, kept, on)
            return output, h_n, c_n, kept
        states = float_state(call, call.h0).repeat(2, 1, 1)
        c = float_state(call, call.c0) if call.has_c else None
        run_steps(forward_step(call, output, kept, states, c, on), T)
        h_n.copy_(states[T % 2])
        if c is not None:
            c_n.copy_(c)
    return output, h_n, c_n, kept


def backward_sequence(
    grads: Sequence[Tensor | None], call: Call, kept: Kept, results: tuple[Tensor, ...], dq: Tensor,
    sums: Tensor | None, on: Machine,
) -> Launch:  # fmt: skip
    """sums: empty_sums(), with a layer norm."""
    grad_output, grad_h_n, grad_c_n = grads
    own = {
        "grad_h_n_ptr": contiguous(grad_h_n), "grad_c_n_ptr": contiguous(grad_c_n) if call.has_c else None,
        "grad_h0_ptr": None if call.h0 is None else results[2], "grad_c0_ptr": None if call.c0 is None else results[3],
        "sums_ptr": sums,
    }  # fmt: skip
    own |= backward_arguments(grad_output, call, kept, results[0], dq)
    return sequence_launch(backward_sequence_kernel, call, on, own)


def backward_step(
    grad_output: Tensor | None, call: Call, kept: Kept, dx: Tensor, dq: Tensor, dh: Tensor, dc: Tensor | None,
    on: Machine,
) -> tuple[Launch, ...]:  # fmt: skip
    """The launches of the last step. dh, dc (B, H): where the gradients of the states are kept up to date."""
    own = backward_arguments(grad_output, call, kept, dx, dq) | {"dh_ptr": dh, "dc_ptr": dc}
    before = call.cell == "gru_before"
    kernels = (backward_step_kernel, backward_reset_kernel) if before else (backward_step_kernel,)
    return tuple(step_launch(kernel, call, on, own) for kernel in kernels)


def backward(grads: Sequence[Tensor | None], call: Call, kept: Kept, needs_weight: bool) -> tuple[Tensor, ...]:
    results = empty_backward(call, needs_weight)
    dx, dweight_hh, dh0, dc0, dbias_hh = results[:5]
    grad_output, grad_h_n, grad_c_n = grads
    (T, B, H), on = call.sizes, machine(call.x)
    if B * H == 0:
        for result in results:
            result.zero_()
        return results
    dq, sums = q_gradient(call, dx), None if call.ln_weight is None else empty_sums(call)
    with guard(call.x):
        if holds_weights(call, on):
            backward_sequence(grads, call, kept, results, dq, sums, on).run()
        elif sums is not None:
            normed.backward(grads, call, kept, results, dq, sums, on)
        else:
            dh = float_state(call, grad_h_n)
            dc = float_state(call, grad_c_n) if call.has_c else None
            run_steps(backward_step(grad_output, call, kept, dx, dq, dh, dc, on), T)
            if call.h0 is not None:
                dh0.copy_(dh + through_first(call, dq))
            if call.c0 is not None and dc is not None:
                dc0.copy_(dc)
        if needs_weight:
            weight_gradient(call, kept, dq, dweight_hh)
        if sums is not None:
            norm_gradients(sums, call, results)
        elif call.bias_hh is not None:
            dbias_hh.copy_(dq.sum((0, 1), dtype=torch.float32))
    return results


def through_first(call: Call, dq: Tensor) -> Tensor | float:
    """What reaches the initial state through the q of the first step taken, where it is what was multiplied."""
    T, _, H = call.sizes
    if T == 0:
        return 0.0
    first = T - 1 if call.reverse else 0
    dq_first = dq.select(call.time, first).float()
    if call.reset is not None:
        dq_first = dq_first.masked_fill(call.reset.select(call.time, first).unsqueeze(-1), 0.0)
    direct = call.direct * H
    return dq_first[:, :direct] @ call.weight_hh[:direct].float()
