"""The wording of every complaint about an argument: the op, the argument, what was expected, what came.

    indrnn: weight_hh must be (H,) = (64,), got (32,)

A wrong type or dtype is a TypeError, everything else a ValueError.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense Tensor, got {value.layout}")


def rank(op: str, name: str, value: Tensor, symbols: str) -> None:
    """symbols names the dimensions, as in "(T, B, H)"."""
    n = symbols.count(",") + (not symbols.endswith(",)"))
    if value.dim() != n:
        raise ValueError(f"{op}: {name} must be {symbols}, got {tuple(value.shape)}")


def shape(op: str, name: str, value: Tensor, symbols: str, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} must be {symbols} = {expected}, got {tuple(value.shape)}")


def width(op: str, name: str, value: Tensor, symbols: str, label: str, expected: int, dim: int = -1) -> None:
    """One dimension alone, which the module's own sizes settle; label names it, as in "D = input_size"."""
    if value.shape[dim] != expected:
        raise ValueError(f"{op}: {name} must be {symbols} with {label} = {expected}, got {tuple(value.shape)}")


def dtype(op: str, name: str, value: Tensor, expected: Sequence[torch.dtype]) -> None:
    if value.dtype not in expected:
        raise TypeError(f"{op}: {name} must be {_dtypes(expected)}, got {_dtypes([value.dtype])}")


def device(op: str, name: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as {other} is, got {value.device}")


def gates(op: str, name: str, value: Any, count: int) -> None:
    """(B, count * H), floating."""
    tensor(op, name, value)
    rank(op, name, value, f"(B, {count}H)")
    dtype(op, name, value, FLOATING)
    if value.shape[1] % count != 0:
        raise ValueError(f"{op}: {name} must be (B, {count}H), got {tuple(value.shape)}")


def parameter(
    op: str, name: str, value: Any, symbols: str, expected: tuple[int, ...], x: Tensor, beside: str = "x"
) -> None:
    """A weight, bias or state beside x: x's dtype, or float32 beside a 16-bit x (which is what autocast gives)."""
    tensor(op, name, value)
    shape(op, name, value, symbols, expected)
    dtype(op, name, value, (x.dtype, torch.float32) if x.dtype in SIXTEEN_BIT else (x.dtype,))
    device(op, name, value, beside, x)


def choice(op: str, name: str, value: Any, options: Collection[str]) -> None:
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {value!r}")


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def real(value: Any) -> bool:
    """Whether value is a number, one of numpy's, or one that an export keeps symbolic."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, Real)) and not isinstance(value, bool)


def positive(op: str, name: str, value: Any) -> None:
    if not real(value):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not value > 0:  # NaN too
        raise ValueError(f"{op}: {name} must be positive, got {value!r}")


def not_negative(op: str, name: str, value: Any) -> None:
    number(op, name, value)
    if not value >= 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value!r}")


def finite_positive(op: str, name: str, value: Any) -> None:
    positive(op, name, value)
    if value == float("inf"):
        raise ValueError(f"{op}: {name} must be finite, got {value!r}")


def whole(value: Any) -> bool:
    """Whether value is an int, one of numpy's, or one that an export keeps symbolic."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def count(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value!r}")


def number(op: str, name: str, value: Any) -> None:
    if not real(value):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if value != value:  # not math.isnan, which torch.compile cannot trace on a symbolic number
        raise ValueError(f"{op}: {name} must not be NaN")


def probability(op: str, name: str, value: Any) -> None:
    number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a probability in [0, 1], got {value!r}")


def mask(op: str, name: str, value: Any, symbols: str, expected: tuple[int, ...], x: Tensor, beside: str = "x") -> None:
    """A bool tensor beside x."""
    tensor(op, name, value)
    dtype(op, name, value, (torch.bool,))
    shape(op, name, value, symbols, expected)
    device(op, name, value, beside, x)


def lengths(op: str, value: Any, batch: int, steps: int, x: Tensor, beside: str = "x") -> Tensor:
    """Lengths as an int64 tensor (B,). A list or a CPU tensor is checked; a CUDA tensor is not read by the host."""
    if isinstance(value, (list, tuple)):
        if not all(map(whole, value)):
            raise TypeError(f"{op}: lengths must be a list of ints or an int64 Tensor, got {value!r}")
        for n in value:
            if abs(n) >= 2**63:
                raise ValueError(f"{op}: lengths must lie in [0, T] = [0, {steps}], got {n}")
        value = torch.tensor(value, dtype=torch.int64, device="cpu")  # whatever torch.set_default_device says
    elif not isinstance(value, Tensor):
        raise TypeError(f"{op}: lengths must be a list of ints or an int64 Tensor, got {type(value).__name__}")
    tensor(op, "lengths", value)
    result: Tensor = value
    dtype(op, "lengths", result, (torch.int64,))
    shape(op, "lengths", result, "(B,)", (batch,))
    if result.device.type != "cpu":
        device(op, "lengths", result, beside, x)
    elif not torch.compiler.is_compiling():
        length_values(op, result, steps)
    return result


def length_values(op: str, value: Tensor, steps: int) -> None:
    """Refuses a length outside [0, T]. Only a CPU tensor is read: reading another would wait for the device. What is
    traced has no values yet; there the op looks when it runs.
    """
    if value.device.type != "cpu" or value.numel() == 0 or torch._C._are_functorch_transforms_active():
        return
    if backends.dispatches(value):
        return
    low, high = (int(v) for v in torch.aminmax(value))
    if low < 0 or high > steps:
        raise ValueError(f"{op}: lengths must lie in [0, T] = [0, {steps}], got {low if low < 0 else high}")
