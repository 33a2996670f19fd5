"""gru for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from recattn_kernels.ops.gated.spec import Samples, cost, inputs, workloads
from recattn_kernels.ops.gru.api import gru
from recattn_kernels.ops.gru.contract import BACKENDS
from recattn_kernels.spec import OpSpec

GRU = Samples(3)
# Of the original form, what its other order of reset and product may change.
ORIGINAL = (
    "plain", "wide", "one_row", "one_element", "reset", "lengths", "zoneout", "everything", "everything_reverse",
    "everything_batch_first", "no_steps", "nan",
)  # fmt: skip

SPEC = OpSpec(
    name="gru",
    function=gru,
    backends=tuple(BACKENDS),
    samples=(*GRU.all(), *GRU.variant("original_", ORIGINAL, reset_after=False)),
    workloads=workloads(),
    inputs=inputs(3),
    scratch=2.5,  # dL/d(W_hh h) in float32, beside a 16-bit gradient of x
    cost=cost("gru", 3),
)
