"""lstm(): see api.py."""

from recattn_kernels.ops.lstm.api import lstm

__all__ = ["lstm"]
