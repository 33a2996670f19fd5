"""The backends of gru_step."""

from __future__ import annotations

import torch

from recattn_kernels import backends
from recattn_kernels.ops.operator import Call


def _cpp_refusal(call: Call) -> str | None:
    return None


def _triton_refusal(call: Call) -> str | None:
    return "it has no float64 kernel" if call.x.dtype == torch.float64 else None


BACKENDS: backends.Table = {"cpp": _cpp_refusal, "triton": _triton_refusal}
