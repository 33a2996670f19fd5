"""slot_attention(): see api.py."""

from recattn_kernels.ops.slot_attention.api import slot_attention

__all__ = ["slot_attention"]
