"""What rnn, lstm and gru mean beyond the samples: torch.nn's recurrences, their options one by one, and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import recattn_kernels
from recattn_kernels import BackendUnavailableError, explain, gru, gru_step, lstm, lstm_step, rnn
from recattn_kernels.spec import tensors

T, B, H = 7, 4, 6
OPS: dict[str, tuple[Callable[..., Any], type[nn.RNNBase], int]] = {
    "rnn": (rnn, nn.RNN, 1), "lstm": (lstm, nn.LSTM, 4), "gru": (gru, nn.GRU, 3),
}  # fmt: skip
each_op = pytest.mark.parametrize("name", OPS)
each_backend = pytest.mark.parametrize("backend", ["reference", "cpp"])


def arguments(name: str) -> tuple[Tensor, Tensor]:
    G = OPS[name][2]
    return torch.randn(T, B, G * H, dtype=torch.float64), torch.randn(G * H, H, dtype=torch.float64) / 3


def given(name: str, h: Tensor, c: Tensor) -> dict[str, Any]:
    return {"state": (h, c)} if name == "lstm" else {"h0": h}


@each_op
@each_backend
def test_equals_torch_nn_on_packed_sequences(name: str, backend: str) -> None:
    function, layer, _ = OPS[name]
    module = layer(5, H, bidirectional=True).double()
    x, lengths = torch.randn(T, B, 5, dtype=torch.float64), torch.tensor([3, 7, 1, 5])
    packed, expected = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = pad_packed_sequence(packed)
    outputs, states = [], []
    for suffix in ("_l0", "_l0_reverse"):
        p = {n: getattr(module, n + suffix) for n in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")}
        output, state = function(
            F.linear(x, p["weight_ih"], p["bias_ih"]), p["weight_hh"], bias_hh=p["bias_hh"], lengths=lengths,
            reverse="reverse" in suffix, backend=backend,
        )  # fmt: skip
        outputs.append(output)
        states.append(tensors(state))
    torch.testing.assert_close(torch.cat(outputs, -1), padded)
    torch.testing.assert_close([torch.stack(s) for s in zip(*states, strict=True)], tensors(expected))


@each_op
@each_backend
def test_a_reset_begins_a_new_sequence(name: str, backend: str) -> None:
    function = OPS[name][0]
    x, weight = arguments(name)
    h, c = torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    output, state = function(x, weight, reset=reset, backend=backend, **given(name, h, c))
    torch.testing.assert_close(output[:3], function(x[:3], weight, backend=backend, **given(name, h, c))[0])
    fresh, last = function(x[3:], weight, backend=backend)
    torch.testing.assert_close((output[3:], tensors(state)), (fresh, tensors(last)))


@each_op
@each_backend
def test_a_row_without_steps_keeps_its_state(name: str, backend: str) -> None:
    function = OPS[name][0]
    x, weight = arguments(name)
    h, c = torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    h.requires_grad_()
    lengths = list(np.array([2, 0, 7, 1]))  # numpy's integers, as a loader may have them
    output, state = function(x, weight, lengths=lengths, backend=backend, **given(name, h, c))
    assert not output[:, 1].any()
    assert torch.equal(tensors(state)[0][1], h[1])
    (grad,) = torch.autograd.grad(tensors(state)[0][1].sum(), h)
    assert torch.equal(grad, torch.zeros(B, H, dtype=torch.float64).index_fill(0, torch.tensor(1), 1.0))


@each_op
@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.interpret)])
def test_frozen_weights_have_no_product(name: str, backend: str) -> None:
    x, weight = (t.float().requires_grad_() for t in arguments(name))
    bias = torch.randn(len(weight), requires_grad=True)

    class Products(TorchDispatchMode):
        gradients: ClassVar[list[Tensor]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **kwargs or {})
            if func.name() == f"recattn_kernels::{name}_backward":
                self.gradients.append(results[1])
            return results

    found = []
    for given in (weight, weight.detach()):
        output = OPS[name][0](x, given, bias_hh=bias, backend=backend)[0]
        with Products():
            found.append(torch.autograd.grad(output.sin().sum(), (x, bias)))
    assert [g.shape for g in Products.gradients] == [weight.shape, (0,)]
    assert all(map(torch.equal, *found))


@each_op
@each_backend
def test_zoneout_everywhere_keeps_the_state(name: str, backend: str) -> None:
    function = OPS[name][0]
    x, weight = arguments(name)
    h, c = torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    mask = torch.ones(T, B, H, dtype=torch.bool)
    options = {"zoneout_mask": (mask, mask) if name == "lstm" else mask, "training": True}
    output, state = function(x, weight, backend=backend, **options, **given(name, h, c))
    assert torch.equal(output, h.expand(T, B, H))
    assert torch.equal(tensors(state)[-1], c if name == "lstm" else h)
    ignored = function(x, weight, backend=backend, **(options | {"training": False}), **given(name, h, c))[0]
    assert torch.equal(ignored, function(x, weight, backend=backend, **given(name, h, c))[0])


@each_op
def test_zoneout_draws_as_often_as_asked(name: str) -> None:
    function, _, G = OPS[name]
    x, weight = torch.randn(50, 8, G * 32), torch.randn(G * 32, 32) / 6
    output, _ = function(x, weight, zoneout=0.25, training=True)
    kept = (output[1:] == output[:-1]).float().mean()
    assert abs(kept - 0.25) < 0.02
    torch.manual_seed(5)
    first = function(x, weight, zoneout=0.25, training=True)[0]
    torch.manual_seed(5)
    assert torch.equal(function(x, weight, zoneout=0.25, training=True)[0], first)
    assert not torch.equal(function(x, weight, zoneout=0.25, training=True)[0], first)
    evaluated = function(x, weight, zoneout=0.25)[0]
    assert not (evaluated[1:] == evaluated[:-1]).any()


@each_backend
def test_lstm_zoneout_of_c_leaves_the_new_h(backend: str) -> None:
    """h mixes with o * tanh(c before zoneout)."""
    x, weight = arguments("lstm")
    nothing, everything = (torch.full((1, B, H), value) for value in (False, True))
    output, (_, c_n) = lstm(x[:1], weight, zoneout_mask=(nothing, everything), training=True, backend=backend)
    torch.testing.assert_close(output, lstm(x[:1], weight, backend=backend)[0])
    assert not c_n.any()


@each_backend
def test_grad_clip_bounds_each_step(backend: str) -> None:
    x, weight = arguments("rnn")
    x.requires_grad_()
    output, _ = rnn(x, weight, grad_clip=0.1, backend=backend)
    (grad,) = torch.autograd.grad(output, x, torch.full_like(output, 100.0))
    torch.testing.assert_close(grad, 0.1 * (1 - output.detach() ** 2))


@each_backend
def test_lstm_grad_clip_bounds_the_flow_of_c_before_h_adds_to_it(backend: str) -> None:
    x, weight = arguments("lstm")
    c0 = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    state = (torch.zeros(B, H, dtype=torch.float64), c0)
    output, (_, c_n) = lstm(x[:1], weight, state, grad_clip=0.5, backend=backend)
    i, f, g, o = x[0].chunk(4, -1)
    (grad,) = torch.autograd.grad((c_n * 100).sum() + (output * 100).sum(), c0)
    squashed = torch.tanh(torch.sigmoid(f) * c0 + torch.sigmoid(i) * torch.tanh(g))
    expected = (0.5 + 0.5 * torch.sigmoid(o) * (1 - squashed**2)) * torch.sigmoid(f)
    torch.testing.assert_close(grad, expected)


@each_backend
def test_original_gru_resets_before_the_product(backend: str) -> None:
    x, weight = arguments("gru")
    h = torch.randn(B, H, dtype=torch.float64)
    output, _ = gru(x[:1], weight, h, reset_after=False, backend=backend)
    q_r, q_z = (h @ weight[: 2 * H].t()).chunk(2, -1)
    x_r, x_z, x_n = x[0].chunk(3, -1)
    r, z = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z)
    n = torch.tanh(x_n + (r * h) @ weight[2 * H :].t())
    torch.testing.assert_close(output[0], (1 - z) * n + z * h)


def test_one_tensor_for_two_arguments_has_the_gradient_of_both() -> None:
    x, weight = arguments("lstm")
    s = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    for create_graph in (False, True):
        (got,) = torch.autograd.grad(lstm(x, weight, (s, s))[0].sum(), s, create_graph=create_graph)
        (expected,) = torch.autograd.grad(lstm(x, weight, (s, s), backend="reference")[0].sum(), s)
        torch.testing.assert_close(got, expected)


@each_op
def test_references_products_stay_in_float32_under_autocast(name: str) -> None:
    function, _, G = OPS[name]
    x, weight = torch.randn(T, B, G * H).bfloat16(), torch.randn(G * H, H)
    expected = function(x, weight, backend="reference")[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x, weight, backend="reference")[0], expected)


@each_backend
def test_steps_equal_the_sequences(backend: str) -> None:
    x, weight = arguments("lstm")
    h, c = torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    _, expected = lstm(x[:1], weight, (h, c), backend=backend)
    torch.testing.assert_close(lstm_step(x[0] + h @ weight.t(), c, backend=backend), expected)
    x, weight = arguments("gru")
    _, h_n = gru(x[:1], weight, h, backend=backend)
    torch.testing.assert_close(gru_step(x[0], h @ weight.t(), h, backend=backend), h_n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_steps_equal_small_ones(dtype: torch.dtype) -> None:
    """Results of 8 MB and more go past the caches, where their rows are whole lines of one: the last H's are not."""
    for rows, H in ((9000, 256), (2200, 1001)):
        x, q, h, grad = (torch.randn(rows, n * H).to(dtype).requires_grad_() for n in (3, 3, 1, 1))
        gates = torch.randn(rows, 4 * H).to(dtype).requires_grad_()
        for step, inputs in ((lstm_step, (gates, h)), (gru_step, (x, q, h))):
            some = [t[-300:].detach().requires_grad_() for t in inputs]
            large, small = (step(*given, backend="cpp") for given in (inputs, some))
            pairs = zip(large, small, strict=True) if isinstance(large, tuple) else [(large, small)]
            assert all(torch.equal(a[-300:], b) for a, b in pairs)
            large, small = (y[0] if isinstance(y, tuple) else y for y in (large, small))
            of_all = torch.autograd.grad(large, inputs, grad)
            of_some = torch.autograd.grad(small, some, grad[-300:])
            assert all(torch.equal(a[-300:], b) for a, b in zip(of_all, of_some, strict=True))


X, W = torch.randn(4, 3, 20), torch.randn(20, 5)
STATE, MASK = torch.zeros(3, 5), torch.zeros(4, 3, 5).bool()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": 1.0}, TypeError, "lstm: x must be a Tensor, got float"),
    ({"x": X[0]}, ValueError, "lstm: x must be (T, B, 4H), got (3, 20)"),
    ({"x": X[..., :18]}, ValueError, "lstm: x must be (T, B, 4H), got (4, 3, 18)"),
    ({"x": X.long()}, TypeError, "lstm: x must be float64 or float32 or bfloat16 or float16, got int64"),
    ({"weight_hh": W.t()}, ValueError, "lstm: weight_hh must be (4H, H) = (20, 5), got (5, 20)"),
    ({"weight_hh": W.double()}, TypeError, "lstm: weight_hh must be float32, got float64"),
    ({"bias_hh": W[0]}, ValueError, "lstm: bias_hh must be (4H,) = (20,), got (5,)"),
    ({"state": STATE}, TypeError, "lstm: state must be a pair of Tensors (h0, c0), got Tensor"),
    ({"state": (STATE,)}, TypeError, "lstm: state must be a pair of Tensors (h0, c0), got 1 elements"),
    ({"state": (STATE, STATE[:2])}, ValueError, "lstm: c0 must be (B, H) = (3, 5), got (2, 5)"),
    ({"zoneout": 1.5}, ValueError, "lstm: zoneout must be a probability in [0, 1], got 1.5"),
    ({"zoneout": (0.1, "a")}, TypeError, "lstm: zoneout must be a number, got 'a'"),
    (
        {"zoneout": (0.1, 0.1, 0.1)},
        TypeError,
        "lstm: zoneout must be a number or a pair of them (h, c), got 3 elements",
    ),
    ({"zoneout_mask": MASK}, TypeError, "lstm: zoneout_mask must be a pair of Tensors (h, c), got Tensor"),
    ({"zoneout_mask": (MASK[0], None)}, ValueError, "lstm: zoneout_mask must be (T, B, H) = (4, 3, 5), got (3, 5)"),
    ({"zoneout_mask": (MASK.float(), None)}, TypeError, "lstm: zoneout_mask must be bool, got float32"),
    ({"layer_norm": (W, W)}, TypeError, "lstm: layer_norm must be (weight, bias, weight_c, bias_c), got 2 elements"),
    ({"layer_norm": (X[0, 0],) * 4}, ValueError, "lstm: layer_norm's weight_c must be (H,) = (5,), got (20,)"),
    ({"grad_clip": 0.0}, ValueError, "lstm: grad_clip must be positive, got 0.0"),
    ({"reset": MASK}, ValueError, "lstm: reset must be (T, B) = (4, 3), got (4, 3, 5)"),
    ({"lengths": [1, 2, 5]}, ValueError, "lstm: lengths must lie in [0, T] = [0, 4], got 5"),
    ({"training": 1}, TypeError, "lstm: training must be a bool, got 1"),
    ({"backend": "cuda"}, BackendUnavailableError, "lstm: backend 'cuda' cannot run this call: "),
    ({"backend": "vendor"}, BackendUnavailableError, "lstm: backend 'vendor' cannot run this call: torch's own"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight_hh": W, **change}
    with pytest.raises(error, match="^" + re.escape(message)):
        lstm(arguments.pop("x"), arguments.pop("weight_hh"), **arguments)


OTHERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: rnn(X, W), ValueError, "rnn: weight_hh must be (H, H) = (20, 20), got (20, 5)"),
    (lambda: rnn(X[..., :5], W[:5], nonlinearity="gelu"), ValueError, "rnn: nonlinearity must be one of tanh, relu"),
    (lambda: gru(X[..., :15], W[:15], reset_after=1), TypeError, "gru: reset_after must be a bool, got 1"),
    (
        lambda: gru(X[..., :15], W[:15], reset_after=False, layer_norm=(W[0], W[0])),
        ValueError,
        "gru: layer_norm must be None with reset_after=False",
    ),
    (lambda: lstm_step(X, STATE), ValueError, "lstm_step: gates must be (B, 4H), got (4, 3, 20)"),
    (lambda: lstm_step(X[0, :, :18], STATE), ValueError, "lstm_step: gates must be (B, 4H), got (3, 18)"),
    (lambda: lstm_step(X[0], STATE[:2]), ValueError, "lstm_step: c must be (B, H) = (3, 5), got (2, 5)"),
    (lambda: lstm_step(X[0], STATE.to("meta")), ValueError, "lstm_step: c must be on cpu as gates is, got meta"),
    (lambda: gru_step(X[0, :, :15], X[0], STATE), ValueError, "gru_step: h_gates must be (B, 3H) = (3, 15)"),
]


@pytest.mark.parametrize(("call", "error", "message"), OTHERS, ids=[str(i) for i in range(len(OTHERS))])
def test_bad_argument_of_the_others(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_explain() -> None:
    reasons = explain("lstm", X, W, layer_norm=None, training=True, zoneout=0.1)
    assert reasons["reference"] is None
    assert set(reasons) == {"reference", "vendor", "cpp", "triton", "cuda"}
    assert explain("gru_step", X[0, :, :15], X[0, :, :15], STATE)["reference"] is None
    before = torch.get_rng_state()
    explain("lstm", X, W, training=True, zoneout=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_public_names() -> None:
    for name in ("rnn", "lstm", "gru", "lstm_step", "gru_step", "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"):
        assert name in recattn_kernels.__all__


@pytest.mark.parametrize("backend", ["reference", "cpp", pytest.param("triton", marks=pytest.mark.interpret)])
def test_a_mask_takes_out_any_gradient(backend: str) -> None:
    """As torch's backward does: times 0 it would be NaN."""
    x, weight = torch.randn(6, 3, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    dy = torch.randn(6, 3, 5)
    dy[4, 0], dy[5, 1] = float("inf"), float("nan")
    output, _ = rnn(x, weight, nonlinearity="relu", backend=backend)
    h, expected = torch.zeros(3, 5), []
    for x_t in x:
        h = torch.relu(x_t + h @ weight.T)
        expected.append(h)
    got = torch.autograd.grad(output, (x, weight), dy)
    want = torch.autograd.grad(torch.stack(expected), (x, weight), dy)
    assert (want[0][4, 0] == 0).any() and (want[0][5, 1] == 0).any()
    torch.testing.assert_close(got, want, equal_nan=True)
