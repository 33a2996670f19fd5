"""gru_step for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

from recattn_kernels.ops.gru_step.api import gru_step
from recattn_kernels.ops.gru_step.contract import BACKENDS
from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.spec import OpSpec, Sample, Workload


def sample(name: str, B: int, H: int, /, **options: Any) -> Sample:
    def make(generator: Generator) -> Arguments:
        return (randn(generator, B, 3 * H), randn(generator, B, 3 * H), randn(generator, B, H)), {}

    return Sample(name, make, **options)


def strided(generator: Generator) -> Arguments:
    """Every second row of a wider tensor, and a transposed one."""
    return (
        randn(generator, 12, 3 * 9 + 1, grad=False)[::2, 1:].requires_grad_(),
        randn(generator, 27, 6, grad=False).t().requires_grad_(),
        randn(generator, 9, 6, grad=False).t().requires_grad_(),
    ), {}


def planted(value: float) -> Sample:
    def make(generator: Generator) -> Arguments:
        gates, *rest = sample("", 2, 5).make(generator)[0]
        gates = gates.detach()
        gates[0, 7] = value
        return (gates.requires_grad_(), *rest), {}

    return Sample(f"planted_{value}", make, finite=False)


def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    B, H = workload.sizes["B"], workload.sizes["H"]
    args, kwargs = sample("", B, H).make(generator)
    return tuple(t.detach().to(device, dtype).requires_grad_() for t in args), kwargs


def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Forward: reads the inputs, writes the state. Backward: reads them again, and writes their gradients."""
    n = workload.sizes["B"] * workload.sizes["H"]
    return (23 if backward else 8) * n * dtype.itemsize, (60 if backward else 20) * n


def sized(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, 3 * (n + 1)), torch.randn(n, 3 * (n + 1)), torch.randn(n, n + 1)


SPEC = OpSpec(
    name="gru_step",
    function=gru_step,
    backends=tuple(BACKENDS),
    samples=(
        sample("plain", 3, 17),
        sample("everything", 5, 65),
        sample("one_row", 1, 130),
        sample("one_unit", 4, 1),
        sample("one_element", 1, 1),
        sample("many_rows", 300, 33),
        sample("no_rows", 0, 5),
        sample("no_units", 3, 0),
        Sample("strided", strided),
        planted(float("nan")),
        planted(float("inf")),
        planted(-float("inf")),
    ),
    workloads=(
        Workload("stream", {"B": 1, "H": 512}, "one row, as when answering"),
        Workload("fleet", {"B": 4096, "H": 256}, "many rows, as of simulated agents"),
    ),
    inputs=inputs,
    cost=cost,
    scratch=1.5,  # 16-bit states' gradients are computed in float32
    sized=sized,
)
