"""lstm for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from recattn_kernels.ops.gated.spec import Samples, cost, inputs, workloads
from recattn_kernels.ops.lstm.api import lstm
from recattn_kernels.ops.lstm.contract import BACKENDS
from recattn_kernels.spec import OpSpec

SPEC = OpSpec(
    name="lstm",
    function=lstm,
    backends=tuple(BACKENDS),
    samples=tuple(Samples(4, has_c=True).all()),
    workloads=workloads(),
    inputs=inputs(4),
    scratch=2.5,  # dL/d(W_hh h) in float32, beside a 16-bit gradient of x
    cost=cost("lstm", 4),
)
