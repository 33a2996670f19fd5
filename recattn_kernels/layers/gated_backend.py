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

# The types of oneDNN's kernel, where torch has it: on macOS, say, its LSTM is a loop like the others.
ONEDNN = (torch.float32, torch.bfloat16) if torch.backends.mkldnn.is_available() else ()


# What pays for the start of our kernels: some 100 us of Python and the packing of the weights, two or three times as
# much with a backward to follow. Of one step, so many rows and so many million multiply-adds:
ONE_STEP_ROWS, ONE_STEP = 256, {"rnn": 250, "gru": 75, "lstm": 30}
# Of several, in torch.nn a loop over operations, so many steps, or so many million multiply-adds, or parts of each that
# add up to one: of a forward alone, and with a backward.
SEVERAL_STEPS = {"rnn": ((18, 60), (9, 60)), "gru": ((9, 60), (4, 80)), "lstm": ((9, 60), (4, 80))}


def vendor_is_faster(
    op: str,
    *,
    device: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    H: int,
    cell: bool,
    packed: bool,
    needs_grad: bool,
    onednn: bool,
) -> bool:
    """Whether torch.nn's kernel beats our fused ones on a call that both can run: the rule of backend="auto".

    Args:
        op: rnn, lstm or gru.
        device: the type of the device.
        dtype: of the projected input, which autocast may have made 16-bit.
        T, B, H: steps, rows and hidden features. T is 1 for a cell.
        cell: whether it is one of the cells.
        packed: input is a PackedSequence; T and B are those of the padded batch.
        needs_grad: a backward may follow.
        onednn: whether oneDNN's kernel may run, where it would.

    Measured on CPUs of two cores with AVX-512, one of them with AMX, torch 2.13. There torch.nn has oneDNN's kernel for
    the layer LSTM alone, on padded batches, in float32 and bfloat16; the rest is operations, which ours beats 2 to 10
    times but for its start. On a GPU nothing has been measured yet, and cuDNN's kernels are known to be good.
    """
    if device != "cpu":
        return True
    millions = T * B * H * H * {"rnn": 1, "gru": 3, "lstm": 4}[op] / 1e6
    if op == "lstm" and not cell and not packed and dtype in ONEDNN:
        if needs_grad:
            return onednn and _onednn_trains_faster(dtype, T, B, H)
        return onednn and _onednn_is_faster(dtype, T, B, H, millions)
    if dtype == torch.float64 and not needs_grad and not packed:
        return True
    if T == 1:
        return B < ONE_STEP_ROWS or millions < ONE_STEP[op]
    steps, work = SEVERAL_STEPS[op][needs_grad]
    return T / steps + millions / work < 1


def _onednn_trains_faster(dtype: torch.dtype, T: int, B: int, H: int) -> bool:
    if (T * H <= 640 and H <= 128) or (B >= 64 and H <= 32):  # by a tenth to a fifth
        return True
    # With AMX: it rounds states and gradients to one bfloat16, and ours multiplies three.
    return dtype == torch.bfloat16 and B >= 32 and backends.cpu_capability() == "amx"


def _onednn_is_faster(dtype: torch.dtype, T: int, B: int, H: int, millions: float) -> bool:
    if B <= 4:  # where it takes as long as for many rows
        return H < 256 and T < 64
    # With AMX ours is 1.1 to 1.6 times as fast in float32 where csrc/cpu/amx.h has enough to do.
    tiles = dtype == torch.float32 and B >= 8 and B * H >= 4096 and backends.cpu_capability() == "amx"
    return not tiles or millions < 30


def fused_runs(op: str, cell: str, weight_hh: Tensor, dtype: torch.dtype, T: int, B: int) -> bool:
    """Whether a fused backend of ours runs a call without options; asked before anything is computed for the call."""
    table = TABLES[op]
    x = torch.empty((), dtype=dtype, device=weight_hh.device).expand(T, B, CELLS[cell] * weight_hh.shape[1])
    call = Call(x, weight_hh, *(None,) * 12, cell, 0.0, 0.0, False, False, False, None)
    for backend in table:  # noqa: SIM110  (every call asks, and a generator is a frame more)
        if backends.refusal(backend, table, call) is None:
            return True
    return False
