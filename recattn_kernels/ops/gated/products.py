"""The factors of dL/dweight_hh, which on a GPU is one product over all steps at once; and the gradients of a layer
norm, from what the kernels have summed over time."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels.ops.gated.contract import Call, Kept


def q_gradient(call: Call, dx: Tensor) -> Tensor:
    """Where the gradient of q = W_hh h + bias_hh goes, in x's layout and weight_hh's type: dx itself where it can.

    With a layer norm it is that of W_hh h."""
    same = call.cell != "gru" and call.ln_weight is None and dx.dtype == call.weight_hh.dtype
    return dx if same else dx.new_empty(dx.shape, dtype=call.weight_hh.dtype)


def weight_gradient(call: Call, kept: Kept, dq: Tensor, out: Tensor) -> None:
    """dL/dweight_hh from dL/dq. call.x: output."""
    H, before = call.sizes[2], states_before(call)
    direct = call.direct * H
    flow = dq.reshape(-1, dq.shape[2]).t()
    torch.mm(flow[:direct], before.reshape(-1, H), out=out[:direct])
    if call.direct < call.gates:
        r = kept.gates[..., :H]
        # Of a row that is past its end r may be NaN.
        reset = torch.where(before == 0, 0.0, before * (r.transpose(0, 1) if call.batch_first else r)).to(before.dtype)
        torch.mm(flow[direct:], reset.reshape(-1, H), out=out[direct:])


def norm_width(call: Call) -> int:
    """How many numbers the weights and biases of a layer norm have."""
    return (2 * call.gates + 2 * call.has_c) * call.sizes[2]


def norm_gradients(sums: Tensor, call: Call, results: tuple[Tensor, ...]) -> None:
    """The gradients of the layer norm, and of bias_hh, which is added where its bias is. sums (rows, norm_width)."""
    dbias_hh, *dnorm = results[4:]
    found = sums.sum(0).split([gradient.numel() for gradient in dnorm])
    for gradient, value in zip(dnorm, found, strict=True):
        gradient.copy_(value)
    if call.bias_hh is not None:
        dbias_hh.copy_(found[1])


def states_before(call: Call) -> Tensor:
    """h[t-1] of every step, as output; 0 where the state was reset and where a row takes no step."""
    T, B, H = call.sizes
    output, dtype = call.x, call.weight_hh.dtype
    initial = output.new_zeros((B, H), dtype=dtype) if call.h0 is None else call.h0.to(dtype)
    before = output.new_empty((*output.shape[:2], H), dtype=dtype)
    if T == 0:
        return before
    first, rest, earlier = (T - 1, 0, 1) if call.reverse else (0, 1, 0)
    before.narrow(call.time, rest, T - 1).copy_(output.narrow(call.time, earlier, T - 1))
    before.select(call.time, first).copy_(initial)
    if call.lengths is not None:
        lengths = call.lengths.clamp(0, T)
        t = torch.arange(T, device=output.device)[:, None].expand(T, B)
        if call.batch_first:
            t, lengths = t.t(), lengths[:, None]
        if call.reverse:
            before = torch.where((t == lengths - 1).unsqueeze(-1), initial.unsqueeze(call.time), before)
        before = torch.where((t < lengths).unsqueeze(-1), before, 0.0)
    if call.reset is not None:
        before = before.masked_fill(call.reset.unsqueeze(-1), 0.0)
    return before
