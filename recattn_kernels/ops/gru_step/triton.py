"""gru_step in Triton: see recattn_kernels/ops/gated/triton_one_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from recattn_kernels.ops.gated import triton_one_step as one_step

aot_variants = partial(one_step.variants, "gru")
aot_same = partial(one_step.same, "gru")


def forward(x_gates: Tensor, h_gates: Tensor, h: Tensor) -> tuple[Tensor]:
    h_n = h.new_empty(h.shape)
    one_step.forward(one_step.Step("gru", x_gates, h_gates, h, None), h_n)
    return (h_n,)


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Tensor], options: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x_gates, h_gates, h = inputs
    results = tuple(t.new_empty(t.shape) if need else None for t, need in zip(inputs, needs, strict=True))
    one_step.backward(one_step.Step("gru", x_gates, h_gates, h, None), grads[0], None, (*results, None))
    return results
