"""The backends of additive_attention."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops.operator import Call

ACTIVATIONS = ("tanh", "relu")


def _runs_all(call: Call) -> str | None:
    return None


def _triton_refusal(call: Call) -> str | None:
    if any(t is not None and t.dtype.itemsize == 8 for t in call.inputs):
        return "it computes in float32, and the inputs are float64"
    return None


BACKENDS: backends.Table = {"cpp": _runs_all, "triton": _triton_refusal}
