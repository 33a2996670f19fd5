"""The scan over time where the registry's samples do not reach: long sequences, steep weights, and who takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recattn_kernels import explain, indrnn
from recattn_kernels.ops.indrnn import reference, scan
from recattn_kernels.ops.indrnn.api import normalise

# T, |weight_hh| at most
STEEP = 1.5
LENGTHS = ((5000, 2 ** (1 / 5000)), (784, 1.0), (512, STEEP))


def problem(T: int, bound: float, activation: str) -> tuple[Tensor, ...]:
    """x, weight_hh of both signs with the bounds and 0 among them, h0, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, 2, 32, generator=generator)
    u = (torch.rand(32, generator=generator) * 2 - 1) * bound
    u[:4], u[4:8], u[8] = bound, -bound, 0.0
    if bound == STEEP and activation == "relu":
        x = -x.abs()  # sends the state back to 0, which would overflow otherwise
    h0 = torch.randn(2, 32, generator=generator)
    return x, u, h0, torch.randn(T, 2, 32, generator=generator)


def errors(values: Tensor, exact: Tensor) -> Tensor:
    """The largest error of each column, relative to its largest value."""
    return (values.double() - exact).abs().amax(0) / exact.abs().amax(0).clamp_min(1e-30)


@pytest.mark.parametrize(("T", "bound"), LENGTHS)
@pytest.mark.parametrize("activation", scan.PIECEWISE)
def test_long_sequences(activation: str, T: int, bound: float) -> None:
    if activation == "identity" and bound == STEEP:
        pytest.skip("the sequence itself overflows")
    x, u, h0, _ = problem(T, bound, activation)
    exact, _ = reference.indrnn(x.double(), u.double(), h0.double(), activation=activation)
    walked, walked_n = indrnn(x, u, h0, activation=activation, algorithm="sequential", backend="reference")
    scanned, scanned_n = indrnn(x, u, h0, activation=activation, algorithm="scan", backend="reference")
    assert exact.isfinite().all()
    derivative = reference.DERIVATIVES[activation]
    assert torch.equal(derivative(scanned, 0.0), derivative(walked, 0.0))
    eps = torch.finfo(torch.float32).eps
    assert (errors(scanned, exact) <= 2 * errors(walked, exact).max() + 4 * eps).all()
    torch.testing.assert_close(scanned_n, walked_n, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad_clip", [None, 0.05])
@pytest.mark.parametrize(("T", "bound"), LENGTHS[:2])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_long_gradients(activation: str, T: int, bound: float, grad_clip: float | None) -> None:
    x, u, h0, dy = problem(T, bound, activation)
    output, _ = reference.indrnn(x, u, h0, activation=activation)
    options = {"activation": activation, "grad_clip": grad_clip}
    exact = reference.indrnn_backward(dy.double(), None, output.double(), u.double(), h0.double(), **options)
    walked = reference.indrnn_backward(dy, None, output, u, h0, **options)
    call = normalise(output, u, h0, **options, algorithm="scan")
    scanned = scan.backward(dy, None, call)
    eps = torch.finfo(torch.float32).eps
    for e, w, s in zip(exact[:3], walked[:3], scanned[:3], strict=True):
        assert e is not None and w is not None
        assert (s.double() - e).abs().max() <= 2 * (w.double() - e).abs().max() + 8 * eps * e.abs().max()


def test_an_overflowing_product_is_walked() -> None:
    """5^64 does not fit float32, but the sequence, cut at 6, does."""
    x, _, h0, _ = problem(2048, 1.0, "relu6")
    u = torch.full((32,), 5.0)
    call = normalise(x, u, h0, activation="relu6", algorithm="scan")
    output, h_n = scan.forward(call)
    walked, walked_n = reference.indrnn(x, u, h0, activation="relu6")
    assert torch.equal(output, walked)
    assert torch.equal(h_n, walked_n)


def test_chunks_grow_with_the_square_root_of_time() -> None:
    assert [scan.chunk_steps(T) for T in (0, 1, 33, 784, 5000, 65536)] == [4, 4, 4, 32, 64, 64]
    steps = torch.arange(11.0).view(11, 1)
    chunks = scan.in_chunks(steps, 4)
    assert [chunk.flatten().tolist() for chunk in chunks] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 0]]
    assert torch.equal(scan.from_chunks(chunks, 11), steps)


def call(T: int = 2000, B: int = 8, H: int = 128, **options: Any) -> Any:
    return normalise(torch.empty(T, B, H, device="meta"), torch.empty(H, device="meta"), **options)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, True, True),
        ({"T": 1000}, False, False),
        ({"B": 200}, False, False),
        ({"activation": "tanh"}, False, True),
        ({"algorithm": "sequential"}, False, False),
        ({"algorithm": "scan", "T": 3, "B": 5000}, True, True),
        ({"algorithm": "scan", "activation": "leaky_relu"}, False, True),
    ],
)
def test_when_a_gpu_scans(options: dict[str, Any], forward: bool, backward: bool) -> None:
    assert scan.applies(call(**options), 132, forward=True) is forward
    assert scan.applies(call(**options), 132, forward=False) is backward


def test_a_clip_that_clips_nothing_is_none() -> None:
    assert call(grad_clip=float("inf")).grad_clip is None
    assert call(grad_clip=1e39).grad_clip is None
    assert call(grad_clip=1e38).grad_clip == 1e38


def test_cpp_refuses_and_the_reference_takes_it() -> None:
    x, u = torch.randn(9, 2, 5, requires_grad=True), torch.rand(5)
    reasons = explain("indrnn", x, u, algorithm="scan")
    assert reasons["reference"] is None
    assert "scan" in str(reasons["cpp"])
    output, _ = indrnn(x, u, algorithm="scan")
    assert type(output.grad_fn).__name__ == "_IndrnnBackward"  # not the graph of the definition's walk
    torch.testing.assert_close(output, indrnn(x, u, algorithm="sequential", backend="reference")[0])


def test_a_negative_slope_is_walked() -> None:
    """The sign that the scan's derivative reads off the output is not there."""
    x, u = torch.randn(9, 2, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    options = {"activation": "leaky_relu", "negative_slope": -0.5}
    grads = []
    for algorithm in ("scan", "sequential"):
        output, _ = indrnn(x, u, **options, algorithm=algorithm)
        grads.append(torch.autograd.grad(output.square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_under_vmap_the_definition_runs() -> None:
    x, u = torch.randn(3, 9, 2, 5), torch.rand(5)
    batched = torch.vmap(lambda one: indrnn(one, u, algorithm="scan")[0])(x)
    each = torch.stack([indrnn(one, u, algorithm="sequential", backend="reference")[0] for one in x])
    torch.testing.assert_close(batched, each)
