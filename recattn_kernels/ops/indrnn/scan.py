"""IndRNN over time in parallel, exact, in plain PyTorch: the form that the Triton and CUDA kernels follow.

A step of relu, relu6, hardtanh or identity takes the state h to clamp(a h + c, low, high), and two such maps after one
another are such a map again, whatever the sign of a. So T steps are cut into chunks:

    maps    every chunk at once: its steps composed into one map (a, c, low, high)
    carry   one chunk after the other: the map applied to the state before the chunk gives the state before the next
    rerun   every chunk at once: the plain recurrence from the state before it

The rerun is the same arithmetic as a walk over all of T: only the states that chunks start from are rounded otherwise.
With |weight_hh| > 1 a product over a chunk can overflow where the walk stays finite, and NaN and infinity have no map:
a column that meets anything that is not finite is walked.

The backward is linear in the gradient that flows to the step before, for every activation, and with grad_clip again a
chain of clamped lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recattn_kernels.ops.indrnn import reference
from recattn_kernels.ops.indrnn.contract import Call
from recattn_kernels.ops.sequence import compute_dtype, valid_steps

# Whose forward is a clamp of a line. The others' forward is walked.
PIECEWISE = ("relu", "relu6", "hardtanh", "identity")


def chunk_steps(T: int) -> int:
    """Steps in a chunk, L: a power of two about sqrt(T / 2), as maps and rerun take L steps each, and the carry T / L.

    At most 64: |weight_hh| up to 3.9 then stays finite in float32.
    """
    L = 4
    while L < 64 and L * L < T // 2:
        L *= 2
    return L


def applies(call: Call, multiprocessors: int, forward: bool) -> bool:
    """Whether a GPU's backends take the scan: always where it was asked for, under "auto" by this rule.

    A walk has a lane a column: few columns leave most of a GPU idle, and each step waits some 25 cycles for the one
    before. The scan has four times its instructions, 18 cycles a step for each 32 columns of a multiprocessor, so that
    it is behind from about 64 columns on. Under a thousand steps a walk takes some ten microseconds. These are
    estimates, from counts of instructions: nothing has been measured on a GPU.
    """
    T, B, H = call.sizes
    if forward and call.activation not in PIECEWISE:
        return False
    if call.algorithm == "auto":
        return T >= 1024 and 64 * multiprocessors >= B * H
    return call.algorithm == "scan"


class Maps(NamedTuple):
    """h -> clamp(a h + c, low, high), one of each chunk: (C, B, H) each."""

    a: Tensor
    c: Tensor
    low: Tensor
    high: Tensor


def in_chunks(steps: Tensor, L: int) -> list[Tensor]:
    """(T, ...) as L tensors (C, ...), the i-th step of every chunk; zeros after the T-th."""
    T = steps.shape[0]
    chunks = -(-T // L)
    padded = torch.cat((steps, steps.new_zeros((chunks * L - T, *steps.shape[1:]))))
    return list(padded.view(chunks, L, *steps.shape[1:]).unbind(1))


def from_chunks(steps: list[Tensor], T: int) -> Tensor:
    """The inverse of in_chunks."""
    return torch.stack(steps, 1).flatten(0, 1)[:T]


class Steps(NamedTuple):
    """f -> clamp(line(i, f)), the i-th step of every chunk; line(i, f) is through(i, f) + what the step brings."""

    slopes: list[Tensor]
    through: Callable[[int, Tensor], Tensor]  # slope * f, or 0 at a reset, whatever f is
    line: Callable[[int, Tensor], Tensor]
    step: Callable[[int, Tensor], Tensor]
    valid: list[Tensor]  # False: past the row's length, or after the T-th: the step changes nothing


def compose(steps: Steps, like: Tensor) -> Maps:
    """The map of every chunk: c is where its lines take 0, low and high are where its steps take the two infinities."""
    # The product of the slopes is off alike in every chunk, so its error would grow with T: not so in twice the digits.
    a = torch.ones_like(like, dtype=torch.float64)
    c, low, high = torch.zeros_like(like), like - torch.inf, like + torch.inf
    for i, slope in enumerate(steps.slopes):
        ends = (torch.where(slope == 0, 0.0, end) for end in (low, high))  # a slope of 0 forgets any end
        moved = (steps.through(i, a), steps.line(i, c), *(steps.step(i, end) for end in ends))
        valid = steps.valid[i]
        a, c, low, high = (torch.where(valid, new, old) for new, old in zip(moved, (a, c, low, high), strict=True))
    return Maps(a.to(like.dtype), c, torch.where(low > high, high, low), torch.where(low > high, low, high))


def carry(maps: Maps, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk starts from, (C, B, H), and the columns (B, H) for which that is not to be trusted."""
    starts, untrusted = [], torch.zeros_like(state, dtype=torch.bool)
    for a, c, low, high in zip(*maps, strict=True):
        starts.append(state)
        line = a * state + c
        untrusted = untrusted | ~line.isfinite() | ~(low <= high)
        state = torch.where(line < low, low, torch.where(line > high, high, line))
    return torch.stack(starts), untrusted


def taken(steps: Tensor, time: int, backwards: bool) -> Tensor:
    """Steps first, in the order in which they are taken."""
    steps = steps.transpose(0, time)
    return steps.flip(0) if backwards else steps


def valid_in_order(call: Call, backwards: bool) -> Tensor:
    valid = valid_steps(call.x, call.lengths, call.time)
    if valid is None:
        valid = torch.ones(call.sizes[0], 1, 1, dtype=torch.bool, device=call.x.device)
    return taken(valid, 0, backwards)


def resets_in_order(call: Call, backwards: bool) -> Tensor:
    if call.reset is None:
        return torch.zeros(call.sizes[0], 1, 1, dtype=torch.bool, device=call.x.device)
    return taken(call.reset.unsqueeze(-1), call.time, backwards)


def state(given: Tensor | None, call: Call, dtype: torch.dtype) -> Tensor:
    return call.x.new_zeros(call.sizes[1:], dtype=dtype) if given is None else given.to(dtype)


def stored(h: Tensor, call: Call) -> Tensor:
    """h in x's dtype. Rounding to 16 bits may not carry it onto a bound of the activation: the derivative, which the
    backward reads off what is stored, would then be 0 where it is 1."""
    dtype, activation = call.x.dtype, call.activation
    if dtype in (torch.bfloat16, torch.float16):
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        if activation in ("relu", "leaky_relu", "relu6"):
            h = torch.where((h > 0) & (h < tiny), tiny, h)
        if activation == "relu6":
            h = torch.where((h < 6) & (h > 6 - 4 * eps), 6 - 4 * eps, h)
        if activation == "hardtanh":
            inner = 1 - eps / 2
            h = torch.where((h < 1) & (h > inner), inner, torch.where((h > -1) & (h < -inner), -inner, h))
    return h.to(dtype).contiguous()


def walk(call: Call) -> tuple[Tensor, Tensor]:
    """The definition, its output not yet rounded."""
    x = call.x.to(compute_dtype(call.x.dtype))
    return reference.indrnn(x, call.weight_hh, call.h0, **call.definition())


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """output and h_n."""
    if call.activation not in PIECEWISE or call.x.numel() == 0:
        output, h_n = walk(call)
        return stored(output, call), h_n.to(call.h_n_dtype)
    T, _, _ = call.sizes
    L, dtype = chunk_steps(T), compute_dtype(call.x.dtype)
    act, u = reference.ACTIVATIONS[call.activation], call.weight_hh.to(dtype)
    x = call.x.to(dtype) if call.bias is None else call.x.to(dtype) + call.bias.to(dtype)
    v = in_chunks(taken(x, call.time, call.reverse), L)
    resets = in_chunks(resets_in_order(call, call.reverse), L)
    valid = in_chunks(valid_in_order(call, call.reverse), L)

    def through(i: int, h: Tensor) -> Tensor:
        return torch.where(resets[i], 0.0, u * h)

    def line(i: int, h: Tensor) -> Tensor:
        return v[i] + through(i, h)

    def step(i: int, h: Tensor) -> Tensor:
        return act(line(i, h), call.negative_slope)

    maps = compose(Steps([u] * L, through, line, step, valid), torch.zeros_like(v[0]))
    h, untrusted = carry(maps, state(call.h0, call, dtype))
    outputs = []
    for i in range(L):
        h_i = step(i, h)
        outputs.append(torch.where(valid[i], h_i, 0.0))
        h = torch.where(valid[i], h_i, h)
    output, h_n = taken(from_chunks(outputs, T), 0, call.reverse).transpose(0, call.time), h[-1]
    if untrusted.any():
        walked, walked_h_n = walk(call)
        output = torch.where(untrusted.unsqueeze(call.time), walked, output)
        h_n = torch.where(untrusted, walked_h_n.to(dtype), h_n)
    return stored(output, call), h_n.to(call.h_n_dtype).clone()


def backward(grad_output: Tensor | None, grad_h_n: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight_hh, h0 and bias. call.x is the output."""
    if call.x.numel() == 0:
        grads = reference.indrnn_backward(grad_output, grad_h_n, call.x, call.weight_hh, call.h0, **call.definition())
        dx, du, *optional = grads
        return dx, du, *(dx.new_empty(0) if grad is None else grad.clone() for grad in optional)  # type: ignore
    T, _, _ = call.sizes
    L, dtype = chunk_steps(T), compute_dtype(call.x.dtype)
    limit = torch.inf if call.grad_clip is None else call.grad_clip
    u, h0 = call.weight_hh.to(dtype), state(call.h0, call, dtype)
    h = taken(call.x.to(dtype), call.time, call.reverse)
    is_step = valid_in_order(call, call.reverse)
    follows = torch.cat((torch.zeros_like(is_step[:1]), is_step[:-1]))  # a step, not h0, is before it
    h_prev = torch.where(follows, torch.cat((h0[None], h[:-1])), h0)
    h_prev = torch.where(resets_in_order(call, call.reverse), 0.0, h_prev)

    derivatives = in_chunks(reference.DERIVATIVES[call.activation](h.flip(0), call.negative_slope), L)
    dy = in_chunks(taken(grad_output.to(dtype), call.time, not call.reverse), L) if grad_output is not None else None
    resets = in_chunks(resets_in_order(call, not call.reverse), L)
    valid = in_chunks(is_step.flip(0), L)

    def through(i: int, dh: Tensor) -> Tensor:
        return torch.where(resets[i], 0.0, u * reference.times_derivative(dh, derivatives[i], call.activation))

    def dh(i: int, flow: Tensor) -> Tensor:
        return flow if dy is None else dy[i] + flow

    def line(i: int, flow: Tensor) -> Tensor:
        return through(i, dh(i, flow))

    def step(i: int, flow: Tensor) -> Tensor:
        return through(i, dh(i, flow).clamp(-limit, limit))

    slopes = [u * d for d in derivatives]
    flow, untrusted = carry(
        compose(Steps(slopes, through, line, step, valid), torch.zeros_like(derivatives[0])),
        state(grad_h_n, call, dtype),
    )
    gs = []
    for i in range(L):
        g = reference.times_derivative(dh(i, flow).clamp(-limit, limit), derivatives[i], call.activation)
        gs.append(torch.where(valid[i], g, 0.0))
        flow = torch.where(valid[i], torch.where(resets[i], 0.0, u * g), flow)
    g, dh0 = from_chunks(gs, T).flip(0), flow[-1]  # as h
    if untrusted.any():
        walked, _, walked_dh0, _ = reference.indrnn_backward(
            grad_output, grad_h_n, call.x, call.weight_hh, h0, **call.definition()
        )
        g = torch.where(untrusted, taken(walked.to(dtype), call.time, call.reverse), g)
        dh0 = dh0 if walked_dh0 is None else torch.where(untrusted, walked_dh0, dh0)
    du, db = torch.where(is_step, g * h_prev, 0.0).sum((0, 1)), g.sum((0, 1))
    return (
        taken(g, 0, call.reverse).transpose(0, call.time).to(call.x.dtype).contiguous(),
        du.to(call.weight_hh.dtype),
        du.new_empty(0) if call.h0 is None else dh0.to(call.h0.dtype).clone(),
        du.new_empty(0) if call.bias is None else db.to(call.bias.dtype),
    )
