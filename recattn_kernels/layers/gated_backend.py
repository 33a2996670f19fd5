"""Which calls of RNN, LSTM, GRU and their cells are left to torch.nn's own kernels (oneDNN, cuDNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.gated.contract import CELLS, Call
from recattn_kernels.ops.gru.contract import BACKENDS as GRU
from recattn_kernels.ops.lstm.contract import BACKENDS as LSTM
from recattn_kernels.ops.rnn.contract import BACKENDS as RNN

TABLES = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def vendor_is_faster(
    op: str,
    *,
    device: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    H: int,
    packed: bool,
    needs_grad: bool,
) -> bool:
    """Whether torch.nn's kernel beats our fused ones on a call that both can run: the rule of backend="auto".

    Args:
        op: rnn, lstm or gru.
        device: the type of the device.
        dtype: of the projected input, which autocast may have made 16-bit.
        T, B, H: steps, rows and hidden features. T is 1 for a cell.
        packed: input is a PackedSequence; T and B are those of the padded batch.
        needs_grad: a backward may follow.

    Measured on a CPU of two cores with AVX-512, torch 2.13. There torch.nn has oneDNN's kernel for the lstm alone, on
    padded batches, in float32 and bfloat16; the rest is a loop over operations, which ours beats 2 to 10 times but for
    its start: some 50 us of Python. With AMX ours is 1.1 to 1.6 times as fast in float32 where csrc/cpu/amx.h has
    enough to do. On a GPU nothing has been measured yet, and cuDNN's kernels are known to be good.
    """
    if device != "cpu":
        return True
    if packed:
        return False
    if op == "lstm" and dtype in (torch.float32, torch.bfloat16):
        if T == 1 or B <= 4:
            return H < 256 and T < 64 and not needs_grad
        # With a backward both take as long, and ours sums the gradients of the biases to more digits.
        tiles = dtype == torch.float32 and B >= 8 and B * H >= 4096 and backends.cpu_capability() == "amx"
        return not needs_grad and not tiles
    if dtype == torch.float64 and not needs_grad:
        return True
    multiply_adds = T * B * H * H * {"rnn": 1, "gru": 3, "lstm": 4}[op]
    return (4 if needs_grad else 8) > T and multiply_adds < (5e6 if op == "rnn" else 2.5e6)


def fused_runs(op: str, cell: str, weight_hh: Tensor, dtype: torch.dtype, T: int, B: int) -> bool:
    """Whether a fused backend of ours runs a call without options; asked before anything is computed for the call."""
    table = TABLES[op]
    x = torch.empty((), dtype=dtype, device=weight_hh.device).expand(T, B, CELLS[cell] * weight_hh.shape[1])
    call = Call(x, weight_hh, *(None,) * 12, cell, 0.0, 0.0, False, False, False, None)
    for backend in table:  # noqa: SIM110  (every call asks, and a generator is a frame more)
        if backends.refusal(backend, table, call) is None:
            return True
    return False
