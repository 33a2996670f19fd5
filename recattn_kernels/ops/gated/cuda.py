"""rnn, lstm and gru on an NVIDIA GPU, in one launch a direction: hands pointers and strides to csrc/cuda/gated_*.cu.

weight_hh stays in shared memory over all steps. Blocks exchange states through the second-level cache or, where they
are a thread-block cluster, through each other's shared memory; what rows are normalised by goes through the cache. Each
mean over a row is one more wait for all blocks in a step, and so is the second product of reset_after=False. The
products are taken in weight_hh's type and summed in float32. The kernels have been run on a CPU, in emulation, and not
yet on a GPU: nothing is known of their speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops import gpu
from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.gated.contract import (
    CELLS,
    KEPT,
    Call,
    Kept,
    empty_backward,
    empty_forward,
    problem_of,
    reads_output,
)
from recattn_kernels.ops.gated.products import norm_gradients, norm_width, q_gradient, weight_gradient
from recattn_kernels.ops.gpu import DTYPES, typed
from recattn_kernels.strides import contiguous, contiguous_rows, present, sequence

CELL_CODES = {name: code for code, name in enumerate(CELLS)}  # the order of csrc/cuda/kernels.h's enum Cell


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    output, h_n, c_n, kept = empty_forward(call, keep)
    if h_n.numel() == 0:
        return output, h_n, c_n, kept
    x, bias_hh, h0, c0 = contiguous_rows(call.x), *map(contiguous, (call.bias_hh, call.h0, call.c0))
    holds, common, _ = _common(call, backward=False)
    with gpu.guard(x):
        gpu.cuda().gated_forward(
            common, gpu.stream(), typed(bias_hh), typed(h0), typed(c0), sequence(x, call.time),
            sequence(output, call.time), typed(h_n), typed(c_n), tuple(map(present, kept)),
        )  # fmt: skip
    del holds
    return output, h_n, c_n, kept


def backward(grads: Sequence[Tensor | None], call: Call, kept: Kept, needs_weight: bool) -> tuple[Tensor, ...]:
    results = empty_backward(call, needs_weight)
    dx, dweight_hh, dh0, dc0, dbias_hh = results[:5]
    _, B, H = call.sizes
    if B * H == 0:
        for result in results:
            result.zero_()
        return results
    output, dq, width = contiguous_rows(call.x), q_gradient(call, dx), KEPT[call.cell] * H
    dy = None if grads[0] is None else contiguous_rows(grads[0])
    dh_n, dc_n, h0, c0 = map(contiguous, (grads[1], grads[2] if call.has_c else None, call.h0, call.c0))
    gates = sequence(output, call.time) if reads_output(call) else (kept.gates.data_ptr(), B * width, width)
    holds, common, plan = _common(call, backward=True)
    sums = None
    if call.ln_weight is not None:
        sums = output.new_empty((launch_plan.ceil_div(B, plan.rows), norm_width(call)), dtype=torch.float32)
    with gpu.guard(output):
        gpu.cuda().gated_backward(
            common, gpu.stream(), math.inf if call.grad_clip is None else call.grad_clip, typed(h0), typed(c0),
            sequence(dy, call.time), sequence(output, call.time), gates, tuple(map(present, kept)),
            sequence(dx, call.time), sequence(None if dq is dx else dq, call.time), typed(dh_n), typed(dc_n),
            typed(dh0), typed(dc0), 0 if sums is None else sums.data_ptr(),
        )  # fmt: skip
        if needs_weight:
            weight_gradient(call, kept, dq, dweight_hh)
        if sums is not None:
            norm_gradients(sums, call, results)
        elif call.bias_hh is not None:
            dbias_hh.copy_(dq.sum((0, 1), dtype=torch.float32))
    del holds
    return results


def _common(call: Call, backward: bool) -> tuple[list[Tensor | None], tuple[Any, ...], launch_plan.Plan]:
    """Tensors that have to live as long as their pointers, the arguments that both directions take, and the plan."""
    problem, time = problem_of(call)._replace(backward=backward), call.time
    on = gpu.gpu_of(call.x.device)
    with gpu.guard(call.x):
        if launch_plan.cluster_limit(on) > 0 and not gpu.cuda().gated_clusters():
            on = on._replace(capability=(8, 0))
    plan = launch_plan.launch_plan(problem, call.sizes[1], on)
    if isinstance(plan, str):
        raise backends.BackendUnavailableError(f"{call.op}: backend 'cuda' cannot run this call: {plan}")
    workspace = call.x.new_empty(plan.workspace, dtype=torch.uint8)
    weight_hh, lengths = call.weight_hh.contiguous(), contiguous(call.lengths)
    norm = [contiguous(p) for p in (call.ln_weight, call.ln_bias, call.ln_c_weight, call.ln_c_bias)]
    keep_h, keep_c = (None if m is None else contiguous_rows(m) for m in (call.keep_h, call.keep_c))
    common = (
        call.sizes, CELL_CODES[call.cell], DTYPES.index(call.x.dtype), not problem.exact, typed(weight_hh),
        tuple(map(typed, norm)), sequence(call.reset, time), 0 if lengths is None else lengths.data_ptr(), call.reverse,
        call.mixing, sequence(keep_h, time), sequence(keep_c, time), tuple(plan), workspace.data_ptr(),
    )  # fmt: skip
    return [workspace, weight_hh, lengths, keep_h, keep_c, *norm], common, plan
