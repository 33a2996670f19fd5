"""The backends of additive_attention."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops import gpu

ACTIVATIONS = ("tanh", "relu")

BACKENDS: backends.Table = {"cpp": backends.no_refusal, "triton": gpu.refusal_of_float64}
