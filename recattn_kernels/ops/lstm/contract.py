"""The backends of lstm."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops.gated.contract import triton_refusal

BACKENDS: backends.Table = {
    "triton": triton_refusal,
}
