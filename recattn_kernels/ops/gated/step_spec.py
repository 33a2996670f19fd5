"""What the specs of lstm_step and gru_step share, which differ in the widths of their inputs alone.

widths: how many times H each input (B, width * H) is wide; the first are the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.backends import Table
from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.spec import OpSpec, Sample, Workload

# name -> B, H
SIZES = {
    "plain": (3, 17), "everything": (5, 65), "one_row": (1, 130), "one_unit": (4, 1), "one_element": (1, 1),
    "many_rows": (300, 33), "no_rows": (0, 5), "no_units": (3, 0),
}  # fmt: skip

WORKLOADS = (
    Workload("stream", {"B": 1, "H": 512}, "one row, as when answering"),
    Workload("fleet", {"B": 4096, "H": 256}, "many rows, as of simulated agents"),
)


def step_spec(function: Callable[..., Any], table: Table, widths: Sequence[int], outputs: int) -> OpSpec:
    """The spec of a step; outputs: how many (B, H) it returns."""

    def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
        args, kwargs = random(widths, workload.sizes["B"], workload.sizes["H"])(generator)
        return tuple(t.detach().to(device, dtype).requires_grad_() for t in args), kwargs

    def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """Forward: reads the inputs, writes the outputs. Backward: reads the inputs again and the outputs' gradients,
        and writes those of the inputs."""
        n, forward = workload.sizes["B"] * workload.sizes["H"], sum(widths) + outputs
        moved = 2 * forward + sum(widths) if backward else forward
        return moved * n * dtype.itemsize, (60 if backward else 20) * n

    def sized(n: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(n, width * (n + 1)) for width in widths)

    return OpSpec(
        name=function.__name__,
        function=function,
        backends=tuple(table),
        samples=(
            *(Sample(name, random(widths, B, H)) for name, (B, H) in SIZES.items()),
            Sample("strided", strided(widths)),
            *(planted(widths, value) for value in (float("nan"), float("inf"), -float("inf"))),
        ),
        workloads=WORKLOADS,
        inputs=inputs,
        cost=cost,
        scratch=1.5,  # 16-bit states' gradients are computed in float32
        sized=sized,
    )


def random(widths: Sequence[int], B: int, H: int) -> Callable[[Generator], Arguments]:
    return lambda generator: (tuple(randn(generator, B, width * H) for width in widths), {})


def strided(widths: Sequence[int]) -> Callable[[Generator], Arguments]:
    """Gates that are every second row of a wider tensor, and transposed others."""
    gates, *others = widths

    def make(generator: Generator) -> Arguments:
        rows = randn(generator, 12, gates * 9 + 1, grad=False)[::2, 1:].requires_grad_()
        rest = (randn(generator, width * 9, 6, grad=False).t().requires_grad_() for width in others)
        return (rows, *rest), {}

    return make


def planted(widths: Sequence[int], value: float) -> Sample:
    """One gate of one unit has the value."""

    def make(generator: Generator) -> Arguments:
        gates, *rest = random(widths, 2, 5)(generator)[0]
        gates = gates.detach()
        gates[0, 7] = value
        return (gates.requires_grad_(), *rest), {}

    return Sample(f"planted_{value}", make, finite=False)
