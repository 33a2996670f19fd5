"""lstm_step for the tests and the benchmarks: see recattn_kernels/ops/gated/step_spec.py."""

from __future__ import annotations

from recattn_kernels.ops.gated.step_spec import step_spec
from recattn_kernels.ops.lstm_step.api import lstm_step
from recattn_kernels.ops.lstm_step.contract import BACKENDS

SPEC = step_spec(lstm_step, BACKENDS, widths=(4, 1), outputs=2)
