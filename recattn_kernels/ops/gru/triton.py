"""gru in Triton: see recattn_kernels/ops/gated/triton.py."""

from functools import partial

from recattn_kernels.ops.gated import triton_aot
from recattn_kernels.ops.gated.triton import backward, forward

__all__ = ["aot_same", "aot_variants", "backward", "forward"]

aot_variants = partial(triton_aot.variants, ("gru", "gru_before"))
aot_same = partial(triton_aot.same, ("gru", "gru_before"))
