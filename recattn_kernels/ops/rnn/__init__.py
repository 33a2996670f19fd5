"""rnn(): see api.py."""

from recattn_kernels.ops.rnn.api import rnn

__all__ = ["rnn"]
