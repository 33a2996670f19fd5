"""IndRNN as a module: the bound on its weights, initialisation, autocast, compilation, backends."""

from __future__ import annotations

import copy

import pytest
import torch
from test_layers_indrnn import D, H
from torch import Tensor

from recattn_kernels import BackendUnavailableError, use_backend
from recattn_kernels.layers.indrnn import IndRNN, IndRNNCell


def test_initialisation() -> None:
    T = 50
    high, low = 2 ** (1 / T), 2 ** (-1 / T)
    ranges = {
        (None, None): [(0, 1), (0, 1)],
        (None, T): [(0, high), (low, high)],
        (1.5, None): [(0, 1.5), (0, 1.5)],
        (1.0, T): [(0, 1.0), (low, 1.0)],
        (0.5, T): [(0, 0.5), (0.5, 0.5)],
    }
    for (recurrent_max, sequence_length), expected in ranges.items():
        layer = IndRNN(10, 2000, 2, bidirectional=True, recurrent_max=recurrent_max, sequence_length=sequence_length)
        for k, (a, b) in enumerate(expected):
            for suffix in ("", "_reverse"):
                u = layer.get_parameter(f"weight_hh_l{k}{suffix}")
                slack = 0.02 * (b - a)
                assert a <= u.min() <= a + slack + 1e-7 and b - slack - 1e-7 <= u.max() <= b + 1e-7
                assert (layer.get_parameter(f"bias_l{k}{suffix}") == 0).all()
        assert 0.0095 < layer.get_parameter("weight_ih_l0").std() < 0.0105
    assert 0.99 < IndRNNCell(3, 2000).weight_hh.max() <= 1
    assert 1.98 < IndRNNCell(3, 2000, recurrent_max=2).weight_hh.max() <= 2


def test_bound_is_a_clamp_with_a_straight_through_gradient() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = IndRNN(D, H, recurrent_max=0.9, nonlinearity="tanh")
    clamped = IndRNN(D, H, nonlinearity="tanh")
    values = torch.tensor([0.3, 2.0, -2.0, -0.5])
    with torch.no_grad():
        layer.weight_hh_l0.copy_(values)
    clamped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        clamped.weight_hh_l0.clamp_(-0.9, 0.9)
    x = torch.randn(6, 2, D, generator=generator)
    output, expected = layer(x)[0], clamped(x)[0]
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, clamped.weight_hh_l0.grad)
    assert torch.equal(layer.weight_hh_l0, values)  # forward leaves the parameter as it is
    assert layer.clamp_recurrent_() is layer
    assert torch.equal(layer.weight_hh_l0, clamped.weight_hh_l0)
    assert torch.equal(layer(x)[0], output)


def test_clamp_recurrent_reaches_every_layer() -> None:
    layer = IndRNN(D, H, 2, bidirectional=True, recurrent_max=0.5)
    cell = IndRNNCell(D, H, recurrent_max=0.5)
    free = IndRNN(D, H)
    for module in (layer, cell, free):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(3.0)
        module.clamp_recurrent_()
        for name, p in module.named_parameters():
            assert (p == (0.5 if "weight_hh" in name and module is not free else 3.0)).all()
            assert p.requires_grad


def test_grad_clip_bounds_the_gradient_of_every_step() -> None:
    layer = IndRNN(1, 1, nonlinearity="identity", bias=False, grad_clip=0.5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1.0), layer.weight_hh_l0.fill_(2.0)
    x = torch.zeros(4, 1, 1, dtype=torch.float64, requires_grad=True)
    layer(x)[0][-1].backward(torch.ones(1, 1, dtype=torch.float64))
    assert x.grad.flatten().tolist() == [0.5] * 4


# A citizen of torch.nn


def test_state_dict_keys() -> None:
    layer = IndRNN(D, H, 2, bidirectional=True, norm="before")
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    buffers = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = [f"{name}{s}" for s in suffixes for name in ("weight_ih", "weight_hh", "bias")]
    assert set(layer.state_dict()) == {*keys, *(f"norm{s}.{buffer}" for s in suffixes for buffer in buffers)}
    assert layer.weight_ih_l1_reverse.shape == (H, 2 * H) and layer.weight_hh_l1.shape == (H,)
    assert list(IndRNN(D, H, bias=False).state_dict()) == ["weight_ih_l0", "weight_hh_l0"]
    assert list(IndRNNCell(D, H).state_dict()) == ["weight_ih", "weight_hh", "bias"]


@pytest.mark.parametrize("norm", [None, "before", "after"])
def test_autocast(norm: str | None) -> None:
    torch.manual_seed(0)
    layer = IndRNN(D, H, 2, norm=norm)
    exact = copy.deepcopy(layer)
    x = torch.randn(5, 2, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(x, lengths=[5, 4])
        again, _ = layer(x, h_n)  # a state under autocast is what the next call gets
    assert output.dtype == h_n.dtype == again.dtype == torch.bfloat16
    (output.float().sum() + again.float().sum()).backward()
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}
    torch.testing.assert_close(output.float(), exact(x, lengths=[5, 4])[0], rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        h = IndRNNCell(D, H)(x[0], torch.zeros(2, H))
    assert h.dtype == torch.float32  # as the state that it was given


def test_sixteen_bit_parameters() -> None:
    layer = IndRNN(D, H, 2, dtype=torch.bfloat16)
    output, h_n = layer(torch.randn(5, 2, D, dtype=torch.bfloat16), torch.zeros(2, 2, H))
    assert output.dtype == torch.bfloat16 and h_n.dtype == torch.float32


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])])
def test_compiles_to_one_graph(lengths: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = IndRNN(D, H, 2, norm="before", residual=True, bidirectional=True, recurrent_max=0.5)
    other = copy.deepcopy(layer)
    x = torch.randn(5, 2, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module, run in ((layer, compiled), (other, other)):
        output, h_n = run(x, lengths=lengths)
        (output.sum() + h_n.sum()).backward()
        results.append((output, h_n, {name: p.grad for name, p in module.named_parameters()}, module.state_dict()))
    torch.testing.assert_close(*results)


def test_functional_transforms() -> None:
    layer = IndRNN(D, H, 2, recurrent_max=0.5, dtype=torch.float64)
    x = torch.randn(5, 2, D, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    grads = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(grads.values()), list(expected))
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)  # unbatched rows
    torch.testing.assert_close([g.sum(0) for g in per_row.values()], list(expected))


def test_empty_batches() -> None:
    for norm in (None, "before", "after"):
        layer = IndRNN(D, H, 2, norm=norm, residual=True)
        h0 = torch.randn(2, 2, H)
        output, h_n = layer(torch.zeros(0, 2, D), h0)
        assert output.shape == (0, 2, H) and torch.equal(h_n, h0)
        output, h_n = layer(torch.zeros(5, 0, D), lengths=[])
        assert output.shape == (5, 0, H) and h_n.shape == (2, 0, H)
        output.sum().backward()
    assert IndRNNCell(D, H)(torch.zeros(0, D)).shape == (0, H)


def test_backend() -> None:
    x = torch.randn(5, 2, D)
    layer = IndRNN(D, H, backend="reference")
    expected = layer(x)[0]
    layer.backend = None
    with use_backend("reference"):
        assert torch.equal(layer(x)[0], expected)
    for module in (IndRNN(D, H, backend="cuda"), IndRNNCell(D, H, backend="cuda")):
        with pytest.raises(BackendUnavailableError, match=r"^indrnn: backend 'cuda' cannot run this call"):
            module(x if isinstance(module, IndRNN) else x[0])
