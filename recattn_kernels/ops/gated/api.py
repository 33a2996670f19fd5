"""What the public functions rnn, lstm and gru do with their arguments, and their derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends, checks
from recattn_kernels.ops import sequence
from recattn_kernels.ops.autograd import c_apply, derive, needs_grad, recompute
from recattn_kernels.ops.gated import contract
from recattn_kernels.ops.gated.contract import CELLS, LIBRARY, PARAMETERS, TENSORS, Call, Kept
from recattn_kernels.ops.sequence import compute_dtype, on_device


def normalise(
    op: str,
    cell: str,
    x: Tensor,
    weight_hh: Tensor,
    state: Any,
    *,
    bias_hh: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | list[int] | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    grad_clip: float | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    zoneout_mask: Any = None,
    layer_norm: tuple[Tensor, ...] | None = None,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> Call:
    """Checks the arguments of a gated recurrence, before any work, and puts them in one form.

    batch_sizes: as a layer has them; no argument of the public functions.
    """
    for name, flag in (("reverse", reverse), ("batch_first", batch_first), ("training", training)):
        checks.flag(op, name, flag)
    if grad_clip is not None:
        checks.positive(op, "grad_clip", grad_clip)
    G, lstm = CELLS[cell], cell == "lstm"
    GH = "H" if G == 1 else f"{G}H"
    symbols = f"(N, {GH})" if batch_sizes is not None else f"(B, T, {GH})" if batch_first else f"(T, B, {GH})"
    checks.tensor(op, "x", x)
    checks.rank(op, "x", x, symbols)
    checks.dtype(op, "x", x, checks.FLOATING)
    if batch_sizes is not None:
        T, B = len(batch_sizes), int(batch_sizes[0])
    else:
        B, T = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if x.shape[-1] % G != 0:
        raise ValueError(f"{op}: x must be {symbols}, got {tuple(x.shape)}")
    H = x.shape[-1] // G
    wide = f"({GH},)"
    checks.parameter(op, "weight_hh", weight_hh, f"({GH}, H)", (G * H, H), x)
    if bias_hh is not None:
        checks.parameter(op, "bias_hh", bias_hh, wide, (G * H,), x)

    h0, c0 = pair(op, "state", state, "a pair of Tensors (h0, c0)") if lstm else (state, None)
    for name, value in (("h0", h0), ("c0", c0)):
        if value is not None:
            checks.parameter(op, name, value, "(B, H)", (B, H), x)
    rates: Any = zoneout if lstm and isinstance(zoneout, (tuple, list)) else (zoneout, 0.0)
    zoneout_h, zoneout_c = pair(op, "zoneout", rates, "a number or a pair of them (h, c)")
    for rate in (zoneout_h, zoneout_c):
        checks.probability(op, "zoneout", rate)
    keep_h, keep_c = zoneout_mask, None
    if lstm:
        keep_h, keep_c = pair(op, "zoneout_mask", zoneout_mask, "a pair of Tensors (h, c)")
    order, shape = (("B", "T"), (B, T)) if batch_first else (("T", "B"), (T, B))
    for name, mask, last in (("reset", reset, ()), ("zoneout_mask", keep_h, (H,)), ("zoneout_mask", keep_c, (H,))):
        if mask is not None:
            checks.mask(op, name, mask, f"({', '.join((*order, *('H' for _ in last)))})", (*shape, *last), x)
    if lengths is not None:
        if batch_sizes is None or not isinstance(lengths, Tensor):  # else they were made of batch_sizes
            lengths = checks.lengths(op, lengths, B, T, x)
        lengths = on_device(op, lengths, x)
    norm = _layer_norm(op, layer_norm, lstm, wide, G * H, H, x)
    clip = None if grad_clip is None or grad_clip > torch.finfo(compute_dtype(x.dtype)).max else float(grad_clip)
    return Call(
        x, weight_hh, h0, c0, bias_hh, *norm, reset, lengths,
        keep_h if training else None, keep_c if training else None, batch_sizes,
        cell, float(zoneout_h), float(zoneout_c), training, reverse, batch_first, clip,
    )  # fmt: skip


def pair(op: str, name: str, value: Any, what: str) -> tuple[Any, Any]:
    """The two elements of an optional pair."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{len(value)} elements" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{op}: {name} must be {what}, got {got}")
    return value[0], value[1]


Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _layer_norm(op: str, value: Any, lstm: bool, wide: str, GH: int, H: int, x: Tensor) -> Norm:
    """Weight, bias and, in the lstm, those of c."""
    if value is None:
        return None, None, None, None
    names = ("weight", "bias", "weight_c", "bias_c") if lstm else ("weight", "bias")
    if not isinstance(value, (tuple, list)) or len(value) != len(names):
        got = f"{len(value)} elements" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{op}: layer_norm must be ({', '.join(names)}), got {got}")
    for name, parameter in zip(names, value, strict=True):
        symbols, width = ("(H,)", H) if name.endswith("_c") else (wide, GH)
        checks.parameter(op, f"layer_norm's {name}", parameter, symbols, (width,), x)
    weight, bias, weight_c, bias_c = value if lstm else (*value, None, None)
    return weight, bias, weight_c, bias_c


def _drawn(call: Call) -> Call:
    """The call with the masks of zoneout that it was not given, in training."""
    if not call.training:
        return call

    def mask(keep: Tensor | None, rate: float) -> Tensor | None:
        if keep is not None or rate == 0:
            return keep
        T, B, H = call.sizes
        return torch.rand((B, T, H) if call.batch_first else (T, B, H), device=call.x.device) < rate

    return call._replace(
        keep_h=mask(call.keep_h, call.zoneout_h),
        keep_c=mask(call.keep_c, call.zoneout_c) if call.has_c else None,
    )


def _padded(call: Call) -> Call:
    sizes = call.batch_sizes
    return call if sizes is None else call._replace(x=sequence.pad(call.x, sizes), batch_sizes=None)


Definition = Callable[[Call], tuple[Tensor, ...]]
# op -> its reference: output, h_n and, in the lstm, c_n of a call
_DEFINITIONS: dict[str, Definition] = {}


class _Gated(torch.autograd.Function):
    """Saves what the backend keeps, output and, for a second derivative, the inputs."""

    @staticmethod
    def forward(ctx: Any, op: str, run: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
        call = Call(*args[:-2])
        output, h_n, c_n, *kept = run(*call, True, args[-1])
        ctx.save_for_backward(output, *kept, *call[: len(TENSORS)])
        ctx.op, ctx.options, ctx.backend = op, call[len(TENSORS) :], args[-1]
        ctx.mark_non_differentiable(*kept, *([] if call.has_c else [c_n]))
        ctx.set_materialize_grads(False)
        return output, h_n, c_n, *kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        output, kept, inputs = saved[0], saved[1:5], saved[5:]
        needs = ctx.needs_input_grad[2 : 2 + len(PARAMETERS)]
        rest = [None for _ in range(len(Call._fields) - len(PARAMETERS) + 2)]  # keep and backend too
        if all(g is None for g in grads[:3]):
            return (None, None, *[None for _ in PARAMETERS], *rest)
        results: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True
            results = _recompute(ctx.op, Call(*inputs, *ctx.options), grads[:3], needs)
        else:
            needs_weight = needs[PARAMETERS.index("weight_hh")]
            args = (*grads[:3], output, *inputs[1:], *ctx.options, *kept, needs_weight, ctx.backend)
            if backends.dispatches(*args[:4], *inputs[1:]):
                results = getattr(torch.ops.recattn_kernels, f"{ctx.op}_backward").default(*args)
            else:
                results = contract.backward(ctx.op, *args)
        return (None, None, *(g if need else None for g, need in zip(results, needs, strict=True)), *rest)


def _recompute(op: str, call: Call, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Sequence[Tensor | None]:
    parameters: tuple[Any, ...] = call[: len(PARAMETERS)]

    def definition(*parameters: Any) -> tuple[Tensor, ...]:
        output, *states = _DEFINITIONS[op](_padded(call._replace(**dict(zip(PARAMETERS, parameters, strict=True)))))
        return output if call.batch_sizes is None else sequence.pack(output, call.batch_sizes), *states

    return recompute(definition, parameters, grads[: 3 if call.has_c else 2], needs)


_differentiable = c_apply(_Gated)


def define(op: str, definition: Definition) -> None:
    """Registers the op and its derivative. definition: the reference, of a call."""
    contract.define(op)
    _DEFINITIONS[op] = definition
    derive(LIBRARY, op, len(PARAMETERS), 3 + len(Kept._fields), functools.partial(_differentiable, op))


def run(op: str, call: Call, table: backends.Table, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n, on the backend that is asked for. Without a c, c_n is empty."""
    backend = backends.choose(op, backend, table, call)
    # Packed rows are for cpp alone, and nothing that is recorded has them.
    if call.batch_sizes is not None and (backend != "cpp" or backends.dispatches(call.x, call.weight_hh)):
        padded, *states = run(op, _padded(call), table, backend)
        return sequence.pack(padded, call.batch_sizes), states[0], states[1]
    call = _drawn(call)
    if backend == "reference":
        output, h_n, *c_n = _DEFINITIONS[op](call)
        return output, h_n, c_n[0] if c_n else h_n
    tensors: tuple[Any, ...] = call[: len(TENSORS)]
    if backends.dispatches(*tensors):
        results = getattr(torch.ops.recattn_kernels, op).default(*call, False, backend)
    elif needs_grad(tensors[: len(PARAMETERS)]):
        results = _differentiable(op, functools.partial(contract.forward, op), *call, False, backend)
    else:
        results = contract.forward(op, *call, False, backend)
    return results[0], results[1], results[2]
