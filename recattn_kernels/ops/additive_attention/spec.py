"""additive_attention for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.ops.additive_attention.api import additive_attention
from recattn_kernels.ops.additive_attention.contract import BACKENDS
from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.spec import OpSpec, Sample, Workload


def sample(name: str, B: int, N: int, A: int, D: int, /, *, masked: bool = False, **kwargs: Any) -> Sample:
    def make(generator: Generator) -> Arguments:
        args = (randn(generator, B, A), randn(generator, B, N, A), scores(generator, A), randn(generator, B, N, D))
        return args, kwargs | ({"mask": mask(generator, B, N)} if masked else {})

    return Sample(name, make)


def scores(generator: Generator, A: int) -> Tensor:
    """A weight for scores of about 1, as of a layer at its initialisation. Large ones make a choice of the softmax, and
    its gradient the difference of equal numbers: nothing then tells float64's roundings from what they leave."""
    return randn(generator, A, grad=False).mul_(max(A, 1) ** -0.5).requires_grad_()


def mask(generator: Generator, B: int, N: int) -> Tensor:
    """The first row masked whole, the last not at all, some of the others."""
    kept = torch.rand(B, N, generator=generator) < 0.6
    kept[0], kept[-1] = False, True
    return kept


def everything(generator: Generator) -> Arguments:
    """A mask, the weights, and tensors of which every second row, or a part, or a transpose is taken."""
    B, N, A, D = 4, 7, 37, 19
    query = randn(generator, A, B, grad=False).t().requires_grad_()
    keys = randn(generator, 2 * N, B, A + 3, grad=False)[::2, :, 3:].transpose(0, 1).requires_grad_()
    weight = scores(generator, 2 * A).detach()[::2].requires_grad_()
    values = randn(generator, B, D, N, grad=False).transpose(1, 2).requires_grad_()
    kept = mask(generator, N, B).t()
    kept[1] = False
    return (query, keys, weight, values), {"mask": kept, "return_weights": True}


def beams(generator: Generator) -> Arguments:
    """One image for every row, and what is masked NaN."""
    kept = torch.arange(5) < 3
    rest = (randn(generator, 1, 5, width, grad=False) for width in (6, 65))
    keys, values = (t.masked_fill(~kept[:, None], float("nan")).expand(3, -1, -1).requires_grad_() for t in rest)
    return (randn(generator, 3, 6), keys, scores(generator, 6), values), {"mask": kept.expand(3, 5)}


def planted(value: float, where: int) -> Sample:
    """One number of one row's query, keys or values."""

    def make(generator: Generator) -> Arguments:
        args, kwargs = sample("", 2, 5, 9, 4, return_weights=True).make(generator)
        with torch.no_grad():
            args[where][1].view(-1)[3] = value
        return args, kwargs

    return Sample(f"planted_{value}_{where}", make, finite=False)


def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    B, N, A, D = (workload.sizes[name] for name in "BNAD")

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()

    return (draw(B, A), draw(B, N, A), draw(A, scale=A**-0.5), draw(B, N, D)), {}


def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Forward: reads keys and values. Backward: reads them again, and writes their gradients."""
    B, N, A, D = (workload.sizes[name] for name in "BNAD")
    large = B * N * (A + D)
    small = B * (A + D) + A
    return (3 if backward else 1) * (large + small) * dtype.itemsize, B * N * (
        (8 if backward else 3) * A + (6 if backward else 2) * D
    )


def sized(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, n + 1), torch.randn(n, n + 2, n + 1), torch.randn(n + 1), torch.randn(n, n + 2, n + 3)


SPEC = OpSpec(
    name="additive_attention",
    function=additive_attention,
    backends=tuple(BACKENDS),
    samples=(
        sample("plain", 3, 5, 17, 9),
        Sample("everything", everything),
        sample("relu", 2, 65, 130, 33, activation="relu", masked=True),
        sample("wide", 2, 70, 128, 304),
        sample("one_element", 1, 1, 1, 1, return_weights=True),
        sample("no_rows", 0, 3, 4, 5),
        sample("no_positions", 2, 0, 4, 5, return_weights=True),
        sample("no_width", 2, 3, 0, 5),
        sample("no_features", 2, 3, 4, 0, return_weights=True),
        Sample("beams", beams, smooth=False),
        planted(float("nan"), 1),
        planted(float("inf"), 1),
        planted(-float("inf"), 0),
        planted(float("inf"), 3),
    ),
    workloads=(
        Workload("caption", {"B": 32, "N": 196, "A": 512, "D": 2048}, "Show, attend and tell, on a 14 x 14 map"),
    ),
    inputs=inputs,
    cost=cost,
    sized=sized,
)
