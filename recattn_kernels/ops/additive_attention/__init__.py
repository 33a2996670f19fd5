"""additive_attention(): see api.py."""

from recattn_kernels.ops.additive_attention.api import additive_attention

__all__ = ["additive_attention"]
