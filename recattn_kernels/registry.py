"""The list of ops. Tests, benchmarks, `info` and the README's tables read it."""

from __future__ import annotations

from recattn_kernels.ops.additive_attention.spec import SPEC as ADDITIVE_ATTENTION
from recattn_kernels.ops.glimpse.spec import SPEC as GLIMPSE
from recattn_kernels.ops.gru.spec import SPEC as GRU
from recattn_kernels.ops.gru_step.spec import SPEC as GRU_STEP
from recattn_kernels.ops.indrnn.spec import SPEC as INDRNN
from recattn_kernels.ops.lstm.spec import SPEC as LSTM
from recattn_kernels.ops.lstm_step.spec import SPEC as LSTM_STEP
from recattn_kernels.ops.rnn.spec import SPEC as RNN
from recattn_kernels.ops.slot_attention.spec import SPEC as SLOT_ATTENTION
from recattn_kernels.spec import OpSpec

OPS: tuple[OpSpec, ...] = (INDRNN, RNN, LSTM, GRU, LSTM_STEP, GRU_STEP, SLOT_ATTENTION, GLIMPSE, ADDITIVE_ATTENTION)


def find(name: str) -> OpSpec:
    for spec in OPS:
        if spec.name == name:
            return spec
    raise ValueError(f"op must be one of {', '.join(spec.name for spec in OPS)}, got {name!r}")
