"""lstm_step in Triton: see recattn_kernels/ops/gated/triton_one_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from recattn_kernels.ops.gated import triton_one_step as one_step

aot_variants = partial(one_step.variants, "lstm")
aot_same = partial(one_step.same, "lstm")


def forward(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h, c_n = gates.new_empty(c.shape), c.new_empty(c.shape)
    one_step.forward(one_step.Step("lstm", gates, None, None, c), h, c_n)
    return h, c_n


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Tensor], options: Any,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    gates, c = inputs
    dgates, dc = (t.new_empty(t.shape) if need else None for t, need in zip(inputs, needs, strict=True))
    one_step.backward(one_step.Step("lstm", gates, None, None, c), grads[0], grads[1], (dgates, None, None, dc))
    return dgates, dc
