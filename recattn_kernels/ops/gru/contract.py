"""The backends of gru."""

from __future__ import annotations

from recattn_kernels import backends

BACKENDS: backends.Table = {}
