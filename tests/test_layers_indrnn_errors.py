"""What IndRNN and IndRNNCell refuse, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_layers_indrnn import D, H
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

from recattn_kernels import GRU
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": 0}, ValueError, "IndRNN: input_size must be at least 1, got 0"),
    ({"hidden_size": 2.0}, TypeError, "IndRNN: hidden_size must be an int, got 2.0"),
    ({"num_layers": 0}, ValueError, "IndRNN: num_layers must be at least 1, got 0"),
    ({"num_layers": True}, TypeError, "IndRNN: num_layers must be an int, got True"),
    ({"nonlinearity": "gelu"}, ValueError, "IndRNN: nonlinearity must be one of relu, tanh, .*, got 'gelu'"),
    ({"bias": 1}, TypeError, "IndRNN: bias must be a bool, got 1"),
    ({"batch_first": None}, TypeError, "IndRNN: batch_first must be a bool, got None"),
    ({"dropout": 1.5}, ValueError, r"IndRNN: dropout must be a probability in \[0, 1\], got 1.5"),
    ({"dropout": True}, TypeError, "IndRNN: dropout must be a number, got True"),
    ({"bidirectional": 2}, TypeError, "IndRNN: bidirectional must be a bool, got 2"),
    ({"norm": "layer"}, ValueError, "IndRNN: norm must be one of None, 'before', 'after', got 'layer'"),
    ({"residual": "yes"}, TypeError, "IndRNN: residual must be a bool, got 'yes'"),
    ({"recurrent_max": 0}, ValueError, "IndRNN: recurrent_max must be positive, got 0"),
    ({"recurrent_max": math.inf}, ValueError, "IndRNN: recurrent_max must be finite, got inf"),
    ({"sequence_length": 0}, ValueError, "IndRNN: sequence_length must be at least 1, got 0"),
    ({"sequence_length": 9.5}, TypeError, "IndRNN: sequence_length must be an int, got 9.5"),
    ({"grad_clip": -1}, ValueError, "IndRNN: grad_clip must be positive, got -1"),
    ({"backend": "cudnn"}, ValueError, "IndRNN: backend must be one of auto, .*, got 'cudnn'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        IndRNN(**{"input_size": D, "hidden_size": H, **options})
    if set(options) <= {"input_size", "hidden_size", "bias", "nonlinearity", "recurrent_max", "backend"}:
        with pytest.raises(error, match=f"^{message.replace('IndRNN', 'IndRNNCell')}$"):
            IndRNNCell(**{"input_size": D, "hidden_size": H, **options})


X = torch.zeros(5, 2, D)
PACKED = pack_sequence([torch.zeros(3, D), torch.zeros(2, D)])
STATES = r"IndRNN: h0 must be \(num_layers \* num_directions, B, H\) = \(2, 2, 4\), got "

BAD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None,), {}, TypeError, "IndRNN: input must be a Tensor, got NoneType"),
    ((torch.zeros(D),), {}, ValueError, r"IndRNN: input must be \(T, B, D\) or \(T, D\), got \(3,\)"),
    ((torch.zeros(1, 5, 2, D),), {}, ValueError, r"IndRNN: input must be \(T, B, D\) or \(T, D\), got \(1, 5, 2, 3\)"),
    ((torch.zeros(5, 2, 7),), {}, ValueError,
     r"IndRNN: input must be \(T, B, D\) with D = input_size = 3, got \(5, 2, 7\)"),
    ((torch.zeros(5, 7),), {}, ValueError, r"IndRNN: input must be \(T, D\) with D = input_size = 3, got \(5, 7\)"),
    ((X.double(),), {}, TypeError, "IndRNN: input must be float32, got float64"),
    ((X.long(),), {}, TypeError, "IndRNN: input must be float32, got int64"),
    ((X.to("meta"),), {}, ValueError, "IndRNN: input must be on cpu as weight_ih is, got meta"),
    ((X, torch.zeros(1, 2, H)), {}, ValueError, STATES + r"\(1, 2, 4\)"),
    ((X, torch.zeros(2, H)), {}, ValueError, STATES + r"\(2, 4\)"),
    ((X[:, 0], torch.zeros(2, 1, H)), {}, ValueError,
     r"IndRNN: h0 must be \(num_layers \* num_directions, H\) = \(2, 4\), got \(2, 1, 4\)"),
    ((X, [0]), {}, TypeError, "IndRNN: h0 must be a Tensor, got list"),
    ((X, torch.zeros(2, 2, H).double()), {}, TypeError, "IndRNN: h0 must be float32, got float64"),
    ((X, torch.zeros(2, 2, H, device="meta")), {}, ValueError, "IndRNN: h0 must be on cpu as input is, got meta"),
    ((X,), {"lengths": [5]}, ValueError, r"IndRNN: lengths must be \(B,\) = \(2,\), got \(1,\)"),
    ((X,), {"lengths": [6, 1]}, ValueError, r"IndRNN: lengths must lie in \[0, T\] = \[0, 5\], got 6"),
    ((X,), {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "IndRNN: lengths must be int64, got float32"),
    ((X[:, 0],), {"lengths": [5]}, ValueError, r"IndRNN: lengths must be None with unbatched input, got \[5\]"),
    ((X,), {"reset": torch.zeros(2, 5, dtype=torch.bool)}, ValueError,
     r"IndRNN: reset must be \(T, B\) = \(5, 2\), got \(2, 5\)"),
    ((X,), {"reset": torch.zeros(5, 2)}, TypeError, "IndRNN: reset must be bool, got float32"),
    ((X[:, 0],), {"reset": torch.zeros(5, 2) > 0}, ValueError, r"IndRNN: reset must be \(T,\) = \(5,\), got \(5, 2\)"),
    ((PACKED,), {"lengths": [3, 2]}, ValueError,
     "IndRNN: lengths must be None with a PackedSequence, which has its own"),
    ((PACKED, torch.zeros(2, 3, H)), {}, ValueError, STATES + r"\(2, 3, 4\)"),
    ((PACKED,), {"reset": torch.zeros(2, 3) > 0}, ValueError,
     r"IndRNN: reset must be \(T, B\) = \(3, 2\), got \(2, 3\)"),
    ((pack_sequence([torch.zeros(3, 7)]),), {}, ValueError,
     r"IndRNN: input must be packed \(N, D\) with D = input_size = 3, got \(3, 7\)"),
    ((pack_sequence([torch.zeros(3)]),), {}, ValueError,
     r"IndRNN: input must pack sequences of \(T, D\), got data of \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=lambda v: str(v)[-40:])
def test_bad_calls(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        IndRNN(D, H, 2)(*args, **kwargs)


def test_bad_calls_under_batch_first() -> None:
    layer = IndRNN(D, H, 2, batch_first=True)
    with pytest.raises(
        ValueError, match=r"^IndRNN: input must be \(B, T, D\) with D = input_size = 3, got \(5, 2, 7\)$"
    ):
        layer(torch.zeros(5, 2, 7))
    with pytest.raises(ValueError, match=r"^IndRNN: reset must be \(B, T\) = \(5, 2\), got \(2, 5\)$"):
        layer(X, reset=torch.zeros(2, 5) > 0)
    with pytest.raises(ValueError, match=r"^IndRNN: h0 must be .* = \(2, 5, 4\), got \(2, 2, 4\)$"):
        layer(X, torch.zeros(2, 2, H))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1,), TypeError, "input must be a Tensor, got int"),
        ((torch.zeros(1, 2, D),), ValueError, r"input must be \(B, D\) or \(D,\), got \(1, 2, 3\)"),
        ((torch.zeros(2, 7),), ValueError, r"input must be \(B, D\) with D = input_size = 3, got \(2, 7\)"),
        ((torch.zeros(7),), ValueError, r"input must be \(D,\) with D = input_size = 3, got \(7,\)"),
        ((torch.zeros(2, D).double(),), TypeError, "input must be float32, got float64"),
        ((torch.zeros(2, D), torch.zeros(3, H)), ValueError, r"hx must be \(B, H\) = \(2, 4\), got \(3, 4\)"),
        ((torch.zeros(D), torch.zeros(1, H)), ValueError, r"hx must be \(H,\) = \(4,\), got \(1, 4\)"),
        ((torch.zeros(2, D), torch.zeros(2, H).half()), TypeError, "hx must be float32, got float16"),
    ],
)
def test_bad_calls_of_the_cell(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^IndRNNCell: {message}$"):
        IndRNNCell(D, H)(*args)


@pytest.mark.parametrize("cls", [IndRNN, GRU])
def test_lengths_on_another_device(cls: type[torch.nn.Module]) -> None:
    layer = cls(D, H)
    with FakeTensorMode(allow_non_fake_inputs=True):  # in which there is a GPU
        elsewhere = torch.ones(2, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match=f"^{cls.__name__}: lengths must be on cpu as input is, got cuda:0$"):
            layer(X, lengths=elsewhere)


def test_norm_needs_more_than_one_step_in_training() -> None:
    layer = IndRNN(D, H, norm="before")
    with pytest.raises(ValueError, match=r"^IndRNN: norm needs more than 1 valid step in training, got 1$"):
        layer(X, lengths=[1, 0])
    with pytest.raises(ValueError, match=r"^IndRNN: norm needs more than 1 valid step in training, got 1$"):
        layer(torch.zeros(1, 1, D))
    assert layer.eval()(torch.zeros(1, 1, D))[0].shape == (1, 1, H)
