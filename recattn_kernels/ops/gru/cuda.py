"""gru on an NVIDIA GPU: csrc/cuda/gated_forward.cu and gated_backward.cu, which know its cell."""

from recattn_kernels.ops.gated.cuda import backward, forward

__all__ = ["backward", "forward"]
