"""What RNN, LSTM and GRU refuse, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_layers_gated import LAYERS, D, H
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from recattn_kernels import GRU, LSTM, RNN

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layer_norm": 1}, TypeError, "NAME: layer_norm must be a bool, got 1"),
    ({"zoneout": 1.5}, ValueError, r"NAME: zoneout must be a probability in \[0, 1\], got 1.5"),
    ({"zoneout": "x"}, TypeError, "NAME: zoneout must be a number, got 'x'"),
    ({"recurrent_dropout": -0.1}, ValueError, r"NAME: recurrent_dropout must be a probability in \[0, 1\], got -0.1"),
    ({"grad_clip": 0}, ValueError, "NAME: grad_clip must be positive, got 0"),
    ({"backend": "cudnn"}, ValueError, "NAME: backend must be one of auto, .*, got 'cudnn'"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"dropout": 2.0}, ValueError, "dropout should be a number in range .*"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for name, cls in LAYERS.items():
        with pytest.raises(error, match=f"^{message.replace('NAME', name)}$"):
            cls(**{"input_size": D, "hidden_size": H, **options})


def test_bad_pairs_of_zoneout() -> None:
    with pytest.raises(TypeError, match=r"^LSTM: zoneout must be a number or a pair of them \(h, c\), got 3 elements$"):
        LSTM(D, H, zoneout=(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^GRU: zoneout must be a number, got \(0.1, 0.1\)$"):
        GRU(D, H, zoneout=(0.1, 0.1))
    with pytest.raises(ValueError, match=r"^Unknown nonlinearity 'gelu'"):
        RNN(D, H, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"^proj_size argument is only supported for LSTM"):
        GRU(D, H, proj_size=2)


X, Z = torch.zeros(5, 2, D), torch.zeros
PACKED = pack_sequence([Z(3, D), Z(2, D)])

# Arguments that torch.nn refuses in its own words, the same on every backend.
AS_TORCH: list[Callable[[bool], tuple[Any, ...]]] = [
    lambda pair: (Z(D),),
    lambda pair: (Z(1, 5, 2, D),),
    lambda pair: (Z(5, 2, 7),),
    lambda pair: (Z(5, 7),),
    lambda pair: (X.double(),),
    lambda pair: (X.long(),),
    lambda pair: (X, (Z(2, H), Z(2, H)) if pair else Z(2, H)),
    lambda pair: (X[:, 0], (Z(2, 1, H), Z(2, 1, H)) if pair else Z(2, 1, H)),
    lambda pair: (X, (Z(1, 2, H), Z(2, 2, H)) if pair else Z(1, 2, H)),
    lambda pair: (X, (Z(2, 2, H), Z(2, 2, 7)) if pair else Z(2, 2, 7)),
    lambda pair: (PACKED, (Z(2, 3, H), Z(2, 3, H)) if pair else Z(2, 3, H)),
    lambda pair: (pack_sequence([Z(3, 7)]),),
]


@pytest.mark.parametrize("case", range(len(AS_TORCH)))
@pytest.mark.parametrize("name", LAYERS)
def test_bad_calls_in_the_words_of_torch(name: str, case: int) -> None:
    args = AS_TORCH[case](name == "LSTM")
    if name == "LSTM" and isinstance(args[0], PackedSequence):
        args = (pad_packed_sequence(args[0])[0], *args[1:])  # torch.nn.LSTM looks at neither when they are packed
    with pytest.raises(Exception) as expected:
        getattr(nn, name)(D, H, 2)(*args)
    for backend in ("reference", "vendor", "auto", "cpp"):
        with pytest.raises(type(expected.value), match=f"^{re.escape(str(expected.value))}$"):
            LAYERS[name](D, H, 2, backend=backend)(*args)


BAD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None,), {}, TypeError, "GRU: input must be a Tensor, got NoneType"),
    ((X, [0]), {}, TypeError, "GRU: hx must be a Tensor, got list"),
    ((X, Z(2, 2, H).double()), {}, TypeError, "GRU: hx must be float32, got float64"),
    ((X, Z(2, 2, H, device="meta")), {}, ValueError, "GRU: hx must be on cpu as input is, got meta"),
    ((X,), {"lengths": [5]}, ValueError, r"GRU: lengths must be \(B,\) = \(2,\), got \(1,\)"),
    ((X,), {"lengths": [6, 1]}, ValueError, r"GRU: lengths must lie in \[0, T\] = \[0, 5\], got 6"),
    ((X,), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "GRU: lengths must be int64, got float32"),
    ((X[:, 0],), {"lengths": [5]}, ValueError, r"GRU: lengths must be None with unbatched input, got \[5\]"),
    ((PACKED,), {"lengths": [3, 2]}, ValueError, "GRU: lengths must be None with a PackedSequence, which has its own"),
    (
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),), {}, ValueError,
        r"RNN input dtype \(torch.qint8\) does not match weight dtype \(torch.float32\).*",
    ),
    ((X,), {"reset": Z(2, 5) > 0}, ValueError, r"GRU: reset must be \(T, B\) = \(5, 2\), got \(2, 5\)"),
    ((X,), {"reset": Z(5, 2)}, TypeError, "GRU: reset must be bool, got float32"),
    ((X[:, 0],), {"reset": Z(5, 2) > 0}, ValueError, r"GRU: reset must be \(T,\) = \(5,\), got \(5, 2\)"),
    ((PACKED,), {"reset": Z(2, 3) > 0}, ValueError, r"GRU: reset must be \(T, B\) = \(3, 2\), got \(2, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[-40:])
def test_bad_calls(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        GRU(D, H, 2)(*args, **kwargs)


def test_packed_input_of_the_lstm_is_checked() -> None:
    for backend in ("reference", "vendor"):
        layer = LSTM(D, H, 2, backend=backend)
        with pytest.raises(RuntimeError, match=r"^Expected hidden\[0\] size \(2, 2, 4\), got \[2, 3, 4\]$"):
            layer(PACKED, (Z(2, 3, H), Z(2, 3, H)))
        with pytest.raises(RuntimeError, match=r"^input.size\(-1\) must be equal to input_size. Expected 3, got 7$"):
            layer(pack_sequence([Z(3, 7)]))


def test_bad_states_of_the_lstm() -> None:
    state, pair = Z(1, 2, H), r"LSTM: hx must be a pair of Tensors \(h_0, c_0\), got "
    for hx, error, message in (
        (state, TypeError, pair + "Tensor"),
        ((state,), TypeError, pair + "1 elements"),
        ((state, None), TypeError, r"LSTM: hx\[1\] must be a Tensor, got NoneType"),
        ((state.double(), state), TypeError, r"LSTM: hx\[0\] must be float32, got float64"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            LSTM(D, H)(X, hx)
    with pytest.raises(ValueError, match=r"^GRU: input must be on meta as weight_ih_l0 is, got cpu$"):
        GRU(D, H, device="meta", backend="reference")(X)
