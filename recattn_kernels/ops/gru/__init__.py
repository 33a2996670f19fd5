"""gru(): see api.py."""

from recattn_kernels.ops.gru.api import gru

__all__ = ["gru"]
