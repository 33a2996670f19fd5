"""The backends of lstm_step."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops import gpu

BACKENDS: backends.Table = {"cpp": backends.no_refusal, "triton": gpu.refusal_of_float64}
