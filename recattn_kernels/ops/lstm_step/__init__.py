"""lstm_step(): see api.py."""

from recattn_kernels.ops.lstm_step.api import lstm_step

__all__ = ["lstm_step"]
