"""gru_step for the tests and the benchmarks: see recattn_kernels/ops/gated/step_spec.py."""

from __future__ import annotations

from recattn_kernels.ops.gated.step_spec import step_spec
from recattn_kernels.ops.gru_step.api import gru_step
from recattn_kernels.ops.gru_step.contract import BACKENDS

SPEC = step_spec(gru_step, BACKENDS, widths=(3, 3, 1), outputs=1)
