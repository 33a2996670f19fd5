"""normalise, the layer normalisation without parameters that SlotAttention computes with on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.layers.normalise import normalise


@pytest.mark.parametrize("shape", [(3, 40, 64), (700, 65), (2, 1), (5, 130), (0, 8)])
def test_normalise(shape: tuple[int, ...]) -> None:
    extension = backends.extension("_cpu")
    if isinstance(extension, str):
        pytest.skip(extension)
    x, dy = (3 * torch.randn(shape) + 100).requires_grad_(), torch.randn(shape)

    def results(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y = function(x)
        return y.detach(), *torch.autograd.grad(y, x, dy)

    def torchs(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape[-1:])

    exact = results(torchs, x.detach().double().requires_grad_(), dy.double())
    theirs = results(torchs, x, dy)
    before = extension.capability()
    try:
        for name in extension.capabilities():
            extension.set_capability(name)
            apart = torch.stack([x, x], -1).detach()[..., 0].requires_grad_()  # its elements are not side by side
            for given, flow in ((x, dy), (apart, torch.stack([dy, dy], -1)[..., 0])):
                ours = results(lambda t: normalise(t, 1e-5), given, flow)
                for found, plain, true in zip(ours, theirs, exact, strict=True):
                    assert found.shape == true.shape
                    if true.numel() > 0:
                        bound = 8 * torch.finfo(torch.float32).eps * true.abs().max()
                        assert (found - true).abs().max() <= 2 * (plain - true).abs().max() + bound
    finally:
        extension.set_capability(before)


def test_normalise_has_second_derivatives_and_keeps_nan() -> None:
    x = torch.randn(4, 20).requires_grad_()
    weight = torch.randn(4, 20)
    results = []
    for function in (lambda: normalise(x, 1e-5), lambda: F.layer_norm(x, (20,))):
        (grad,) = torch.autograd.grad((function() * weight).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1])
    x = x.detach()
    x[1, 3], x[2, 0] = math.nan, math.inf
    assert normalise(x, 1e-5).isnan().all(1).tolist() == [False, True, True, False]
