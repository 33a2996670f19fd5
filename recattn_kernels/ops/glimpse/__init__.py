"""glimpse(): see api.py."""

from recattn_kernels.ops.glimpse.api import glimpse

__all__ = ["glimpse"]
