"""Fused recurrent and attention kernels for PyTorch, each with a plain-PyTorch reference beside it."""

from recattn_kernels.backends import BackendUnavailableError, explain, use_backend
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell
from recattn_kernels.ops.gru import gru
from recattn_kernels.ops.indrnn import indrnn
from recattn_kernels.ops.lstm import lstm
from recattn_kernels.ops.rnn import rnn

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "IndRNN",
    "IndRNNCell",
    "explain",
    "gru",
    "indrnn",
    "lstm",
    "rnn",
    "use_backend",
]
