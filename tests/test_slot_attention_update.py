"""slot_update: what SlotAttention does after its attention, as one operation on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recattn_kernels import SlotAttention, backends
from recattn_kernels.layers import slot_attention as layer_module
from recattn_kernels.ops.slot_attention import update

pytestmark = [
    pytest.mark.skipif(isinstance(backends.extension("_cpu"), str), reason=str(backends.extension("_cpu"))),
    pytest.mark.usefixtures("absorbing"),
]
EPS = 1e-5


def arguments(R: int, D: int, M: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """In the order of the op's inputs."""
    generator = torch.Generator().manual_seed(R)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = [draw(3 * D, D) / D**0.5, draw(3 * D, D) / D**0.5, draw(3 * D), draw(3 * D), 1 + draw(D), draw(D)]
    mlp = [draw(M, D) / D**0.5, draw(M), draw(D, M) / M**0.5, draw(D)]
    return [t.to(dtype).requires_grad_() for t in (draw(R, D), draw(R, D), *weights, *mlp)]


def ours(*tensors: Tensor) -> Tensor:
    return update.run(*tensors[:2], update.Weights(*tensors[2:]), EPS)


def definition(*tensors: Tensor) -> Tensor:
    return update.slot_update(*tensors, EPS)[0]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 9), (64, 65, 130), (300, 64, 128)])
@pytest.mark.parametrize("threads", [1, 2])
def test_conforms(sizes: tuple[int, int, int], threads: int) -> None:
    """By the rule of the registered ops, on every instruction set."""
    # What both float32 computations are given, exactly.
    given = [t.detach() for t in arguments(*sizes, torch.float32)]
    grad = torch.randn(sizes[:2]).double()

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in given]
        result = function(*inputs)
        return [result, *torch.autograd.grad(result, inputs, grad.to(dtype))]

    exact, plain = results(definition, torch.float64), results(definition, torch.float32)
    extension: Any = backends.extension("_cpu")
    before, before_threads = extension.capability(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in extension.capabilities():
            extension.set_capability(name)
            for i, (found, theirs, true) in enumerate(zip(results(ours, torch.float32), plain, exact, strict=True)):
                bound = (4 if i == 0 else 8) * torch.finfo(torch.float32).eps * true.abs().max()
                assert (found - true).abs().max() <= 2 * (theirs - true).abs().max() + bound, (name, i)
    finally:
        extension.set_capability(before)
        torch.set_num_threads(before_threads)


@pytest.mark.parametrize("only", range(12))
def test_one_gradient_alone(only: int) -> None:
    inputs = arguments(9, 16, 24, torch.float32)
    (everything,) = torch.autograd.grad(ours(*inputs).square().sum(), inputs[only])
    alone = [t.detach().requires_grad_(i == only) for i, t in enumerate(inputs)]
    (found,) = torch.autograd.grad(ours(*alone).square().sum(), alone[only])
    torch.testing.assert_close(found, everything, rtol=0, atol=0)


def test_second_derivatives() -> None:
    def penalty(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = arguments(4, 5, 6, dtype)
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    for found, expected in zip(penalty(ours, torch.float32), penalty(definition, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_strides_empty_and_not_finite() -> None:
    inputs = arguments(6, 8, 12, torch.float32)
    apart = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    torch.testing.assert_close(ours(*apart), ours(*inputs), rtol=0, atol=0)

    none = [t[:0] for t in inputs[:2]]
    result = ours(*none, *inputs[2:])
    assert result.shape == (0, 8)
    grads = torch.autograd.grad(result.sum(), inputs[2:])
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs[2:], strict=True))

    nan = inputs[0].detach().clone()
    nan[2, 3] = float("nan")
    rows = ours(nan, *inputs[1:]).isnan()
    assert rows[2].all()
    assert not rows[[0, 1, 3, 4, 5]].any()


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.recattn_kernels.slot_update.default, (*arguments(3, 4, 5, torch.float32), EPS, "cpp")
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each update that ran as one operation."""
    found: list[bool] = []
    original = update.run

    def run(*args: Any) -> Tensor:
        found.append(True)
        return original(*args)

    monkeypatch.setattr(layer_module.update, "run", run)
    return found


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_reference(absorbed: bool, masked: bool, bias: bool, runs: list[bool]) -> None:
    B, N, K, D = 3, 40, 5, 16
    layer = SlotAttention(K, D, mlp_dim=24, bias=bias, eps_mode="add" if absorbed else "denominator")
    with torch.no_grad():  # what starts as 0 or 1 must count
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain = SlotAttention(K, D, mlp_dim=24, bias=bias, eps_mode=layer.eps_mode, backend="reference").double()
    plain.load_state_dict(layer.state_dict())
    inputs, slots, grad = torch.randn(B, N, D), torch.randn(B, K, D), torch.randn(B, K, D)
    masks = {}
    if masked:
        masks = {"slot_mask": torch.rand(B, K) < 0.7, "input_mask": torch.rand(B, N) < 0.7}

    def results(module: SlotAttention, dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in (inputs, slots)]
        result = module(*given, **masks)
        used = [p for name, p in module.named_parameters() if not name.startswith("slots_")]
        return [result, *torch.autograd.grad(result, [*given, *used], grad.to(dtype))]

    exact = results(plain, torch.float64)
    assert not runs
    found = results(layer, torch.float32)
    assert len(runs) == layer.iters
    for ours_, true in zip(found, exact, strict=True):
        torch.testing.assert_close(
            ours_.double(), true, rtol=1e-4, atol=2e-5 * max(1.0, float(true.detach().abs().max()))
        )


def test_a_layer_that_is_more_than_its_formula_is_called_as_it_is(runs: list[bool]) -> None:
    inputs = torch.randn(2, 9, 8)
    calls: list[str] = []
    for name in ("gru", "norm_mlp", "mlp", "mlp.0", "mlp.1", "mlp.2"):
        layer = SlotAttention(3, 8)
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        layer(inputs)
        assert calls == [name] * layer.iters
        calls.clear()
    layer = SlotAttention(3, 8)
    layer.mlp[0] = torch.nn.Linear(8, 128, bias=False)
    layer(inputs)
    SlotAttention(3, 8, update="residual")(inputs)
    SlotAttention(3, 8, dtype=torch.float64)(inputs.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        SlotAttention(3, 8)(inputs)
    assert not runs
