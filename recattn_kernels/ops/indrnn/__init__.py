"""The independently recurrent layer's recurrence: h[t] = act(x[t] + bias + weight_hh * h[t-1])."""

from recattn_kernels.ops.indrnn.api import indrnn

__all__ = ["indrnn"]
