"""Whether a backend computes what the reference defines: the rule that tests, `recattn check` and `bench` share.

    err(backend) <= 2 * err(reference in the same dtype) + c * eps(dtype) * max|exact|        c = 4, 8 for gradients

exact is the reference in float64 on the same inputs, already rounded to the dtype; err is the largest absolute
difference from it. There is no tolerance to tune: what the reference's own rounding costs sets the scale. In float64
exact takes its matrix products in twice that precision: the reference's own are then seen to round as well.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recattn_kernels.spec import OpSpec, Sample, cast, tensors

OUTPUT_FACTOR, GRADIENT_FACTOR = 4, 8

Function = Callable[..., Any]


class AccurateProducts(TorchDispatchMode):
    """Products of float64 matrices to about 106 bits, before they are rounded to float64."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.float64:
            return accurate_product(*args)
        return op(*args, **(kwargs or {}))


def accurate_product(a: Tensor, b: Tensor) -> Tensor:
    """a ([B,] M, K) times b ([B,] K, N): every term and every sum with what its rounding loses (Ogita, Rump and Oishi,
    2005)."""

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        high = (x * 134217729.0) - (x * 134217729.0 - x)  # 2^27 + 1: each half has 26 bits
        return high, x - high

    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    lost = torch.zeros_like(total)
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    for k in range(a.shape[-1]):
        column, row = (..., k, None), (..., k, None, slice(None))  # of a, of b
        term = a[column] * b[row]
        high, low, high_b, low_b = a_high[column], a_low[column], b_high[row], b_low[row]
        lost += low * low_b - (((term - high * high_b) - low * high_b) - high * low_b)
        after = total + term
        came = after - total
        lost += (total - (after - came)) + (term - came)
        total = after
    result = total + lost
    return torch.where(result.isfinite(), result, a @ b)  # of infinity and NaN the parts make nothing


@dataclass(frozen=True)
class Finding:
    """One output or gradient of one call. complaint is None where it conforms."""

    name: str
    err: float
    allowed: float
    complaint: str | None = None

    @property
    def ratio(self) -> float:
        """err / allowed: at most 1 where the values conform."""
        return self.err / self.allowed if self.allowed > 0 else float(self.err > 0)


@dataclass(frozen=True)
class Result:
    """What a call returned, and the gradients of its inputs: None where one is absent; [] if none were asked for."""

    outputs: list[Tensor]
    grads: list[Tensor | None]


def differentiable(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The inputs whose gradients are compared."""
    return [t for t in tensors((tuple(args), kwargs)) if t.requires_grad]


def evaluate(
    function: Function,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    grad_outputs: Sequence[Tensor | None] | None,
) -> Result:
    """Calls function and differentiates it. An output whose gradient is None is not used; all None: no backward."""
    outputs = tensors(function(*args, **kwargs))
    inputs = differentiable(args, kwargs)
    if grad_outputs is None:
        return Result([o.detach() for o in outputs], [])
    used = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if used and inputs:
        used_outputs, used_grads = zip(*used, strict=True)
        grads = torch.autograd.grad(used_outputs, inputs, used_grads, allow_unused=True)
    return Result([o.detach() for o in outputs], list(grads))


def output_gradients(
    outputs: Sequence[Tensor], generator: torch.Generator, layout: str = "contiguous", used: Sequence[int] | None = None
) -> list[Tensor | None]:
    """A fixed random gradient for each output, rounded to its dtype; None for those that are not used.

    layout: contiguous; expanded: one value for the whole first dimension, at stride 0; transposed: the first two
    dimensions swapped in memory.
    """
    grads: list[Tensor | None] = []
    for i, output in enumerate(outputs):
        shape = output.shape
        swapped = layout == "transposed" and output.dim() >= 2
        expanded = layout == "expanded" and output.dim() >= 1
        if swapped:
            shape = torch.Size((shape[1], shape[0], *shape[2:]))
        elif expanded:
            shape = torch.Size((1, *shape[1:]))
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        grad = grad.to(device=output.device, dtype=output.dtype if output.is_floating_point() else torch.float32)
        grad = grad.transpose(0, 1) if swapped else grad.expand(output.shape) if expanded else grad
        grads.append(grad if used is None or i in used else None)
    return grads


def exactly(value: Any, device: str = "cpu") -> Any:
    """The same numbers in float64."""
    return cast(value, torch.float64, device)


def judge(actual: Result, reference: Result, exact: Result, names: Sequence[str], dtype: torch.dtype) -> list[Finding]:
    """Findings on every output and gradient of `actual`; names are those of the differentiable inputs."""
    if len(actual.outputs) != len(reference.outputs):
        complaint = f"{len(reference.outputs)} outputs were expected, {len(actual.outputs)} came"
        return [Finding("outputs", float("inf"), 0.0, complaint)]
    findings = []
    for i, (a, r, e) in enumerate(zip(actual.outputs, reference.outputs, exact.outputs, strict=True)):
        # An output may be wider than x: float32 states beside a 16-bit x are held to float32.
        eps = torch.finfo(r.dtype).eps if r.is_floating_point() else 0.0
        findings.append(_judge_one(f"output {i}", a, r, e, OUTPUT_FACTOR * eps))
    if not actual.grads:
        return findings
    eps = torch.finfo(dtype).eps
    for name, g, r_grad, e_grad in zip(names, actual.grads, reference.grads, exact.grads, strict=True):
        like = next((t for t in (r_grad, g) if t is not None), None)
        if like is None:
            continue
        g, r, e = (torch.zeros_like(like) if t is None else t for t in (g, r_grad, e_grad))
        findings.append(_judge_one(f"grad {name}", g, r, e, GRADIENT_FACTOR * eps))
    return findings


def _finite(value: Tensor) -> bool:
    """Whether every element is finite, in one pass and without a mask: NaN and infinity carry through."""
    return value.numel() == 0 or all(math.isfinite(bound) for bound in torch.aminmax(value))


def _kind(value: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 infinity, 3 minus infinity."""
    return value.isnan().to(torch.int8) + 2 * value.isposinf().to(torch.int8) + 3 * value.isneginf().to(torch.int8)


def _judge_one(name: str, actual: Tensor, reference: Tensor, exact: Tensor, factor: float) -> Finding:
    for what, a, r in (("shape", actual.shape, reference.shape), ("dtype", actual.dtype, reference.dtype)):
        if a != r:
            return Finding(name, float("inf"), 0.0, f"{what} must be {r}, got {a}")
    dtype = reference.dtype
    if not dtype.is_floating_point:
        equal = torch.equal(actual, reference)
        return Finding(name, float(not equal), 0.0, None if equal else "differs from the reference")
    exact = exact.to(reference.device)
    if all(_finite(t) for t in (actual, reference, exact, exact.to(dtype))):
        return _judge_values(name, actual, reference, exact, factor)
    kind, rounded = _kind(actual), exact.to(dtype)  # rounded: infinite where the dtype overflows
    expected = _kind(reference), _kind(rounded)
    misplaced = (kind != expected[0]) & (kind != expected[1])
    if misplaced.any():
        where = tuple(misplaced.nonzero()[0].tolist())
        got, wanted = float(actual[where]), float(rounded[where])
        return Finding(name, float("inf"), 0.0, f"{got} where {wanted} is right, at {where}")
    finite = (kind == 0) & (expected[0] == 0) & (expected[1] == 0)
    return _judge_values(name, actual[finite], reference[finite], exact[finite], factor)


def _judge_values(name: str, actual: Tensor, reference: Tensor, exact: Tensor, factor: float) -> Finding:
    if exact.numel() == 0:
        return Finding(name, 0.0, 0.0)
    # In float64: the difference of two 16-bit numbers is not one.
    err, reference_err = (float(t.double().sub(exact).abs_().max()) for t in (actual, reference))
    allowed = 2 * reference_err + factor * float(exact.abs().max())
    return Finding(name, err, allowed, None if err <= allowed else f"err {err:.3g} > {allowed:.3g} allowed")


def input_names(function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """What function calls each of its differentiable inputs."""

    def walk(name: str, value: Any) -> Iterator[str]:
        found = [t for t in tensors(value) if t.requires_grad]
        yield from [name] if isinstance(value, Tensor) and found else (f"{name}[{i}]" for i in range(len(found)))

    bound = inspect.signature(function).bind(*args, **kwargs)
    names: dict[int, str] = {}
    for name, value in bound.arguments.items():
        owned = [t for t in tensors(value) if t.requires_grad]
        names.update(zip(map(id, owned), walk(name, value), strict=True))
    return [names[id(t)] for t in differentiable(args, kwargs)]


def compare(
    spec: OpSpec,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    mixed: bool = False,
    layout: str = "contiguous",
    used: Sequence[int] | None = None,
) -> list[Finding]:
    """Runs one sample on one backend and judges every output and gradient by the op's definition.

    mixed keeps everything but the first argument in float32, beside a 16-bit first argument. layout and used shape the
    output gradients as in output_gradients().
    """
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    others = torch.float32 if mixed else dtype
    args = (cast(args[0], dtype, device), *cast(args[1:], others, device))
    kwargs = cast(kwargs, others, device)
    exact_args, exact_kwargs = exactly(args), exactly(kwargs)

    defining = {**spec.variants[0], "backend": "reference"}
    plain = spec.function(*args, **(kwargs | defining))
    generator = torch.Generator().manual_seed(1)
    grads = output_gradients(tensors(plain), generator, layout, used)
    reference = evaluate(spec.function, args, kwargs | defining, grads)
    with AccurateProducts() if dtype == torch.float64 else contextlib.nullcontext():  # type: ignore[no-untyped-call]
        exact = evaluate(spec.function, exact_args, exact_kwargs | defining, exactly(grads))
    actual = evaluate(spec.function, args, kwargs | {"backend": backend}, grads)
    return judge(actual, reference, exact, input_names(spec.function, args, kwargs), dtype)
