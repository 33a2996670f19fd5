"""The backends of gru_step."""

from __future__ import annotations

from recattn_kernels import backends
from recattn_kernels.ops.operator import Call


def _cpp_refusal(call: Call) -> str | None:
    return None


BACKENDS: backends.Table = {"cpp": _cpp_refusal}
