"""The backends of lstm."""

from __future__ import annotations

from recattn_kernels import backends

BACKENDS: backends.Table = {}
