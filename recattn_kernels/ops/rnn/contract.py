"""The backends of rnn."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops.gated.contract import cuda_refusal, triton_refusal

# cuda has not run on a GPU: auto prefers triton until both are measured.
BACKENDS: backends.Table = {"cpp": backends.no_refusal, "triton": triton_refusal, "cuda": cuda_refusal}
