"""lstm on the CPU: csrc/cpu/gated_forward.cpp and gated_backward.cpp, which know its cell."""

from recattn_kernels.ops.gated.cpp import backward, forward

__all__ = ["backward", "forward"]
