"""rnn for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from recattn_kernels.ops.gated.spec import Samples, cost, inputs, workloads
from recattn_kernels.ops.rnn.api import rnn
from recattn_kernels.ops.rnn.contract import BACKENDS
from recattn_kernels.ops.samples import away
from recattn_kernels.spec import OpSpec

RNN = Samples(1)
# With relu no sum may come so near to 0 that a rounding decides its whole gradient.
RELU = ("plain", "wide", "everything_reverse", "layer_norm")

SPEC = OpSpec(
    name="rnn",
    function=rnn,
    backends=tuple(BACKENDS),
    samples=(*RNN.all(), *RNN.variant("relu_", RELU, nonlinearity="relu", x=away, gain=0.05)),
    workloads=workloads(),
    inputs=inputs(1),
    scratch=2.5,  # dL/d(W_hh h) in float32, beside a 16-bit gradient of x
    cost=cost("rnn_tanh", 1),
)
