"""The backends of gru_step."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops import gpu
from recattn_kernels.ops.operator import Call


def _cpp_refusal(call: Call) -> str | None:
    return None


def _triton_refusal(call: Call) -> str | None:
    return gpu.refusal_of_float64(call.x)


BACKENDS: backends.Table = {"cpp": _cpp_refusal, "triton": _triton_refusal}
