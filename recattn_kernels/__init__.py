"""Fused recurrent and attention kernels for PyTorch, each with a plain-PyTorch reference beside it."""

from recattn_kernels.backends import BackendUnavailableError, explain, use_backend
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell
from recattn_kernels.ops.indrnn import indrnn

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "IndRNN",
    "IndRNNCell",
    "explain",
    "indrnn",
    "use_backend",
]
