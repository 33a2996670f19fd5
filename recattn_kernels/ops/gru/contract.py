"""The backends of gru."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops.gated.contract import cpp_refusal, triton_refusal

BACKENDS: backends.Table = {"cpp": cpp_refusal, "triton": triton_refusal}
