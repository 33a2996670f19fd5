"""Random arguments of the recurrences, for their samples: each takes a generator and T, B and the width of x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def randn(generator: Generator, *shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def state(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, B, H)


def bias(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, H)


def reset(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return torch.rand(T, B, generator=generator) < 0.2


def reset_batch_first(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return torch.rand(T, B, generator=generator).t() < 0.2


def lengths(generator: Generator, T: int, B: int, H: int) -> Tensor:
    values = torch.randint(0, T + 1, (B,), generator=generator)
    values[0] = T
    values[-1] = 0
    return values


def planted(value: float) -> Callable[[Generator, int, int, int], Tensor]:
    """x with one value planted in the middle of one column."""

    def make(generator: Generator, T: int, B: int, H: int) -> Tensor:
        x = randn(generator, T, B, H, grad=False)
        x[T // 2, 0, H // 2] = value
        return x.requires_grad_()

    return make


def past_the_end(generator: Generator, T: int, B: int, H: int) -> Tensor:
    """x that is NaN from step 3 on."""
    x = randn(generator, T, B, H, grad=False)
    x[3:] = float("nan")
    return x.requires_grad_()


def expanded(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, T, 1, H, grad=False).expand(T, B, H).requires_grad_()


def strided_rows(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, T, 2 * B, H + 3, grad=False)[:, ::2, 1 : H + 1].requires_grad_()


def strided_columns(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, T, B, 2 * H, grad=False)[..., ::2].requires_grad_()


def transposed(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, B, T, H, grad=False).transpose(0, 1).requires_grad_()


def away(generator: Generator, T: int, B: int, H: int) -> Tensor:
    """x of either sign, far from 0."""
    x = randn(generator, T, B, H, grad=False)
    return (x + 6 * x.sign()).requires_grad_()


def zeros(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return torch.zeros(T, B, H, dtype=torch.float64).requires_grad_()


def frozen(generator: Generator, T: int, B: int, H: int) -> Tensor:
    return randn(generator, T, B, H, grad=False)
