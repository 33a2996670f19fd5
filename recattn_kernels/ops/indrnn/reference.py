"""IndRNN in plain PyTorch: the definition that every other backend is tested against.

    h[t] = act(x[t] + bias + weight_hh * h[t-1])            (Li et al., 2018, eq. 2; * is elementwise)

Works on any device and floating dtype, to any order of derivative, under vmap and forward-mode AD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels.ops.sequence import after_no_steps, compute_dtype, valid_steps, walk


def clamp(v: Tensor, low: float, high: float) -> Tensor:
    """hardtanh whose gradient at NaN is 1 everywhere: torch's own differs between its vector, scalar and CUDA loops."""
    return torch.where(v <= low, low, torch.where(v >= high, high, v))


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda v, slope: F.relu(v),
    "tanh": lambda v, slope: torch.tanh(v),
    "sigmoid": lambda v, slope: torch.sigmoid(v),
    "identity": lambda v, slope: v,
    "leaky_relu": lambda v, slope: F.leaky_relu(v, slope),
    "relu6": lambda v, slope: clamp(v, 0.0, 6.0),
    "hardtanh": lambda v, slope: clamp(v, -1.0, 1.0),
}

# act'(v) from h = act(v). At a kink, and for NaN, the value is the one that torch's own backward takes.
DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda h, slope: torch.where(h <= 0, 0.0, torch.ones_like(h)),
    "tanh": lambda h, slope: 1 - h * h,
    "sigmoid": lambda h, slope: h * (1 - h),
    "identity": lambda h, slope: torch.ones_like(h),
    "leaky_relu": lambda h, slope: torch.where(h > 0, torch.ones_like(h), slope),
    "relu6": lambda h, slope: torch.where((h <= 0) | (h >= 6), 0.0, torch.ones_like(h)),
    "hardtanh": lambda h, slope: torch.where((h <= -1) | (h >= 1), 0.0, torch.ones_like(h)),
}


def times_derivative(g: Tensor, d: Tensor, activation: str) -> Tensor:
    """g * d with such a derivative d. What a mask takes out is 0, as in torch's backward, infinite or NaN as it was."""
    return torch.where(d == 0, 0.0, g) if activation in ("relu", "relu6", "hardtanh") else g * d


def indrnn(
    x: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    act = ACTIVATIONS[activation]
    dtype = compute_dtype(x.dtype)
    u = weight_hh.to(dtype)
    v = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    B, H = x.shape[0 if batch_first else 1], x.shape[2]
    h = v.new_zeros(()).expand(B, H) if h0 is None else h0.to(dtype)
    h_n_dtype = x.dtype if h0 is None else h0.dtype
    if x.shape[1 if batch_first else 0] == 0:
        # Nothing to compute, but every input keeps a gradient (of zeros).
        output = (v * u).to(x.dtype)
        return output, after_no_steps(h, output).to(h_n_dtype)
    output, (h_n,) = walk(
        lambda v_t, states: (act(v_t + u * states[0], negative_slope),), v, (h,),
        reset=reset, lengths=lengths, reverse=reverse, batch_first=batch_first, grad_clip=grad_clip,
    )  # fmt: skip
    return output.to(x.dtype), h_n.to(h_n_dtype)


def indrnn_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    unclipped: Tensor | None = None,
    grad_unclipped: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight_hh, h0 and bias, from output alone: x is not needed.

    g[t] = clip(dy[t] + weight_hh * g[t+1]) * act'(h[t]);  dx = g;  dweight_hh = sum g[t] * h[t-1];  dbias = sum g

    It is differentiable itself, output included, which is how the fused backends get their second derivatives. What
    then reaches h[t] through act'(h[t]) is not clamped: unclipped is output as it is before the clip, from where it is
    added as grad_unclipped.
    """
    time = 1 if batch_first else 0
    T, B, H = output.shape[time], output.shape[1 - time], output.shape[2]
    dtype = compute_dtype(output.dtype)
    u = weight_hh.to(dtype)
    zeros = u.new_zeros(B, H)
    start = zeros if h0 is None else h0.to(dtype)
    flow = zeros if grad_h_n is None else grad_h_n.to(dtype)  # dL/dh[t] from later steps
    dy = None if grad_output is None else grad_output.to(dtype).unbind(time)
    extra = None if grad_unclipped is None else grad_unclipped.to(dtype).unbind(time)
    activated = (output if unclipped is None else unclipped).to(dtype).unbind(time)
    h = output.to(dtype).unbind(time)
    valid = valid_steps(output, lengths, time)
    resets = None if reset is None else reset.unsqueeze(-1).unbind(time)

    grads: list[Tensor] = [zeros] * T
    du = u * 0.0 if T == 0 else torch.zeros_like(u)
    for t in range(T) if reverse else range(T - 1, -1, -1):
        before = t + 1 if reverse else t - 1
        h_prev = h[before] if 0 <= before < T else start
        if valid is not None and reverse and before < T:
            h_prev = torch.where(valid[before], h_prev, start)
        if resets is not None:
            h_prev = torch.where(resets[t], 0.0, h_prev)
        dh = flow if dy is None else dy[t] + flow
        if grad_clip is not None:
            dh = dh.clamp(-grad_clip, grad_clip)
        if extra is not None:
            dh = dh + extra[t]
        g = times_derivative(dh, DERIVATIVES[activation](activated[t], negative_slope), activation)
        to_prev = u * g if resets is None else torch.where(resets[t], 0.0, u * g)
        du_t = g * h_prev
        if valid is None:
            flow = to_prev
        else:
            flow = torch.where(valid[t], to_prev, flow)
            g = torch.where(valid[t], g, 0.0)
            du_t = torch.where(valid[t], du_t, 0.0)
        grads[t] = g
        du = du + du_t.sum(0)
    dx = torch.stack(grads, time) if T else output.to(dtype) * u
    return (
        dx.to(output.dtype),
        du.to(weight_hh.dtype),
        None if h0 is None else flow.to(h0.dtype),
        None if bias is None else dx.sum((0, 1)).to(bias.dtype),
    )
