"""The layers' product of all steps: that of F.linear, and so are its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import recattn_kernels as rk
from recattn_kernels import backends
from recattn_kernels.layers import projection
from recattn_kernels.layers.projection import column_sum, matmul, project

pytestmark = pytest.mark.skipif(isinstance(backends.extension("_cpu"), str), reason="the extension _cpu is not built")


RULE = projection.LEAST


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "LEAST", ((0, 0), (0, 0)))


def arguments(*rows: int, bias: bool = True) -> list[Tensor]:
    shapes = [(*rows, 33), (70, 33), *([(70,)] if bias else [])]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def results(function: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    output = function(*args, *([None] if len(args) == 2 else []))
    grads = torch.autograd.grad(output.sin().sum(), args, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), args)
    return [output, *grads, *second]


each_shape = pytest.mark.parametrize("rows", [(40,), (9, 5), (16,), (15,), (3, 20, 2)])
each_bias = pytest.mark.parametrize("bias", [True, False])


@each_shape
@each_bias
def test_equals_linear_and_its_derivatives(rows: tuple[int, ...], bias: bool) -> None:
    args = arguments(*rows, bias=bias)
    cpu: Any = backends.extension("_cpu")
    widest = cpu.capability()
    if widest == "amx":  # which adds up in another order; as in AVX-512 both sums round alike
        cpu.set_capability("avx512")
    try:
        ours = results(project, args)
    finally:
        cpu.set_capability(widest)
    torch.testing.assert_close(ours, results(F.linear, args), rtol=1e-5, atol=1e-4)


@each_shape
@each_bias
def test_as_close_to_float64_as_linear(rows: tuple[int, ...], bias: bool) -> None:
    args = arguments(*rows, bias=bias)
    exact = results(F.linear, [t.detach().double().requires_grad_() for t in args])
    ours, theirs = (
        [(found - e).abs().max() / e.abs().max() for found, e in zip(results(function, args), exact, strict=True)]
        for function in (project, F.linear)
    )
    for error, allowed in zip(ours, theirs, strict=True):
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps


def test_our_product_is_taken() -> None:
    x, weight, bias = arguments(40)
    output = project(x, weight, bias)
    assert type(output.grad_fn.next_functions[0][0]).__name__ == "_ProjectionBackward"
    with torch.no_grad():
        assert torch.equal(project(x, weight, bias), output)


@pytest.mark.parametrize("differentiates", [False, True])
def test_the_rule_of_auto(differentiates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Size] = []
    monkeypatch.setattr(projection, "LEAST", RULE)
    monkeypatch.setattr(projection, "matmul", lambda a, *_: taken.append(a.shape) or matmul(a, *_))
    weight = torch.randn(256, 300, requires_grad=differentiates)
    for rows, backend in ((127, "auto"), (128, "auto"), (255, "auto"), (256, "auto"), (20, "cpp"), (15, "cpp")):
        project(torch.randn(rows, 300), weight, None, backend)
    project(torch.randn(256, 30), weight[:, :30], None)  # two million multiply-adds
    assert [rows for rows, _ in taken] == ([256, 20] if differentiates else [128, 255, 256, 20])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_arguments(frozen: int) -> None:
    args = arguments(40)
    args[frozen].requires_grad_(False)
    wanted = [t for t in args if t.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(project(*args).sum(), wanted), torch.autograd.grad(F.linear(*args).sum(), wanted)
    )


def test_strides() -> None:
    a, b = torch.randn(50, 40).t(), torch.randn(60, 2, 50).transpose(0, 2)[:, 1]
    torch.testing.assert_close(matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(column_sum(a), a.sum(0))


def test_float16_is_summed_in_float32() -> None:
    args = [t.detach().half().requires_grad_() for t in arguments(40)]
    wide = [t.detach().float().requires_grad_() for t in args]
    output, expected = project(*args), F.linear(*wide)
    assert torch.equal(output, expected.half())
    grad = torch.randn(40, 70).half()
    grads = torch.autograd.grad(output, args, grad)
    for g, e in zip(grads, torch.autograd.grad(expected, wide, grad.float()), strict=True):
        torch.testing.assert_close(g, e.half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "matmul", None)
    x, weight, bias = (t.detach().to(dtype) for t in arguments(40))
    assert torch.equal(project(x, weight, bias), F.linear(x, weight, bias))


def test_autocast_and_transforms_are_left_to_torch() -> None:
    x, weight, bias = (t.detach() for t in arguments(40))
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, weight, bias).dtype == torch.bfloat16
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(torch.vmap(lambda x: project(x, weight, bias))(x.expand(2, 40, 33))[1], expected)
    compiled = torch.compile(project, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight, bias), expected)


LAYERS: dict[str, tuple[type[torch.nn.Module], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "RNN": (rk.RNN, (24, 32), {}, (20, 8, 24)),
    "LSTM": (rk.LSTM, (24, 32), {"layer_norm": True}, (5, 8, 24)),
    "LSTM with proj_size": (rk.LSTM, (24, 32), {"proj_size": 4, "grad_clip": 1.0}, (5, 8, 24)),
    "GRUCell": (rk.GRUCell, (24, 32), {"grad_clip": 1.0}, (20, 24)),
    "IndRNN": (rk.IndRNN, (24, 32), {}, (5, 8, 24)),
    "IndRNNCell": (rk.IndRNNCell, (24, 32), {}, (20, 24)),
    "SlotAttention": (rk.SlotAttention, (3, 24), {}, (8, 200, 24)),
    "SlotAttention with heads": (rk.SlotAttention, (3, 24), {"heads": 2}, (8, 200, 24)),
    "AdditiveAttention": (rk.AdditiveAttention, (16, 24, 8), {}, (20, 4, 24)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_nothing_in_another_backend_than_it_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def extension(name: str, real: Any = backends.extension) -> Any:
        used.append(name)
        return real(name)

    products: list[Tensor] = []

    def product(*args: Tensor) -> Tensor:
        products.append(matmul(*args))
        return products[-1]

    monkeypatch.setattr(backends, "extension", extension)
    monkeypatch.setattr(projection, "matmul", product)
    cls, sizes, options, shape = LAYERS[name]

    def run(asked: str | None) -> None:
        layer = cls(*sizes, **options, backend=asked)
        x = torch.randn(shape, requires_grad=True)
        query = (torch.randn(len(x), 16),) if cls is rk.AdditiveAttention else ()
        output = layer(*query, x)
        output = output[0] if isinstance(output, tuple) else output
        output.sum().backward()

    run("reference")
    with rk.use_backend("reference"):
        run(None)
    assert not used
    run("auto")
    assert "_cpu" in used and products
