"""What the references of the recurrences share, in plain PyTorch: the walk over time, and how it is interrupted.

Works on any device and floating dtype, to any order of derivative, under vmap and forward-mode AD.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class ClipGradient(torch.autograd.Function):
    """Forward: the identity. Backward: the gradient clamped to [-limit, limit]."""

    @staticmethod
    def forward(h: Tensor, limit: float) -> Tensor:
        return h.clone()  # not a view: what follows may be modified in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.limit, ctx.limit), None


class TransformedClipGradient(ClipGradient):
    """The same under vmap and forward-mode AD. torch.compile takes no Function that has a jvp of its own."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the state is kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(op: str, lengths: Tensor, x: Tensor) -> Tensor:
    """lengths where x is, if that is a GPU: once for both directions."""
    if x.device.type != "cuda" or lengths.is_cuda:
        return lengths
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        # A replay would read the host's memory again, which may be another's by then.
        raise ValueError(f"{op}: lengths must be on {x.device} while a CUDA graph is captured, got {lengths.device}")
    return lengths.to(x.device, non_blocking=True)


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """(B,): the steps of each row of a packed batch, whose step t has its first batch_sizes[t] rows."""
    rows = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    return (rows < batch_sizes[:, None]).sum(0)


def pad(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """(T, B, ...) from the rows of a packed batch, with zeros where there are none."""
    return pad_packed_sequence(PackedSequence(x, batch_sizes))[0]


def pack(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """The rows of a packed batch from (T, B, ...)."""
    return pack_padded_sequence(x, lengths_of(batch_sizes)).data


def valid_steps(x: Tensor, lengths: Tensor | None, time: int) -> Tensor | None:
    """(T, B, 1), True where step t of row b is within the row's length."""
    if lengths is None:
        return None
    t = torch.arange(x.shape[time], device=x.device)
    return (t[:, None] < lengths.to(x.device)).unsqueeze(-1)


States = tuple[Tensor, ...]


def walk(
    step: Callable[[Tensor, States], States],
    x: Tensor,
    states: States,
    *,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    zoneout: Sequence[float] = (),
    keep: Sequence[Tensor | None] = (),
) -> tuple[Tensor, States]:
    """states[t] = step(x[t], states[t-1]) over all T >= 1 steps: the first state of every step, and the last states.

    zoneout: for each state the share z of the old one in z * old + (1 - z) * new. keep: for each state a mask shaped as
    the outputs, True where the old one stays. grad_clip bounds the gradient of every state of every step.
    """
    # unbind and stack: indexing x[t] or assigning output[t] in the loop has a backward quadratic in T.
    time = 1 if batch_first else 0
    T = x.shape[time]
    proceeds: list[Tensor | None] = [None] * T  # (B, 1) each: True where the step continues from the states before it
    valid = valid_steps(x, lengths, time)
    if valid is not None:
        # Steps past a row's end start from zeros and are dropped: no NaN or infinity there reaches a gradient.
        x = torch.where(valid.transpose(0, time), x, 0.0)
        proceeds = list(valid.unbind(0))
    if reset is not None:
        resets = reset.unsqueeze(-1).unbind(time)
        proceeds = [~r if p is None else p & ~r for p, r in zip(proceeds, resets, strict=True)]
    keeps = [None if mask is None else mask.unbind(time) for mask in keep]

    clip: type[ClipGradient] = ClipGradient if torch.compiler.is_compiling() else TransformedClipGradient
    x_steps = x.unbind(time)
    outputs: list[Tensor] = [states[0]] * T
    for t in range(T - 1, -1, -1) if reverse else range(T):
        proceeds_t = proceeds[t]
        old = states if proceeds_t is None else tuple(torch.where(proceeds_t, s, 0.0) for s in states)
        new = step(x_steps[t], old)
        if any(zoneout):
            mixed = zip(zoneout, old, new, strict=True)
            new = tuple(n if z == 0 else z * o + (1 - z) * n for z, o, n in mixed)
        if any(masks is not None for masks in keeps):
            mixed_ = zip(keeps, old, new, strict=True)
            new = tuple(n if masks is None else torch.where(masks[t], o, n) for masks, o, n in mixed_)
        if grad_clip is not None:
            new = tuple(clip.apply(n, grad_clip) for n in new)  # type: ignore[no-untyped-call]
        outputs[t] = new[0] if valid is None else torch.where(valid[t], new[0], 0.0)
        states = new if valid is None else tuple(torch.where(valid[t], n, s) for n, s in zip(new, states, strict=True))
    return torch.stack(outputs, time), states


def zeros(x: Tensor, H: int, batch_first: bool) -> Tensor:
    """An initial state for x: (B, H) zeros that take no memory."""
    return x.new_zeros(()).expand(x.shape[0 if batch_first else 1], H)


def layer_norm(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(v - mean) / sqrt(var + 1e-5) * weight + bias over the last dimension (Ba et al., 2016)."""
    return F.layer_norm(v, v.shape[-1:], weight.to(v.dtype), bias.to(v.dtype))


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def recurrent(
    weight_hh: Tensor, bias_hh: Tensor | None, norm: tuple[Tensor | None, ...], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """h -> W_hh h, normalised if norm has a weight and a bias, + bias_hh."""
    W = weight_hh.to(dtype).t()
    b = None if bias_hh is None else bias_hh.to(dtype)
    weight, bias = norm[:2]

    def product(h: Tensor) -> Tensor:
        with _no_autocast(h.device.type):  # which would take a product of states to 16 bits
            r = h @ W
        if weight is not None and bias is not None:
            r = layer_norm(r, weight, bias)
        return r if b is None else r + b

    return product


def no_steps(x: Tensor, H: int, parameters: Sequence[Tensor | None]) -> Tensor:
    """The output of a sequence without steps: nothing, but every input keeps a gradient (of zeros)."""
    return x[..., :H] + sum(p.to(x.dtype).sum() for p in parameters if p is not None)


def after_no_steps(state: Tensor, output: Tensor) -> Tensor:
    """The initial state again, with the gradients that output keeps."""
    return state + output.sum()
