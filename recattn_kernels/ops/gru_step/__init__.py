"""gru_step(): see api.py."""

from recattn_kernels.ops.gru_step.api import gru_step

__all__ = ["gru_step"]
