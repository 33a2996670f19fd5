"""Every op as torch.compile, torch.export, torch.fx, make_fx and torch.jit.trace take it down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_citizenship import FULL, OP, AsFunction, arguments
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from recattn_kernels import backends, glimpse, gru, indrnn, lstm, rnn
from recattn_kernels.spec import OpSpec, Sample, tensors


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["jit", "make_fx"])
@pytest.mark.parametrize(("spec", "sample"), FULL)
def test_traced_without_gradients(spec: OpSpec, sample: Sample, how: str) -> None:
    """What is traced is the op, and not the memory in which its result happened to be."""
    function = AsFunction(spec, sample, torch.float32)
    inputs = tuple(t.detach() for t in function.inputs)
    with torch.no_grad():
        if how == "jit":
            traced = torch.jit.trace(lambda *inputs: function(*inputs), inputs, check_trace=False)
        else:
            traced = make_fx(function, pre_dispatch=True)(*inputs)
        others = [t / 2 for t in inputs]
        torch.testing.assert_close(traced(*others), function(*others))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("spec", "sample"), FULL)
def test_compile_fullgraph(spec: OpSpec, sample: Sample) -> None:
    """One graph, which calls the fused op and not the reference's arithmetic."""
    function = AsFunction(spec, sample, torch.float32)
    ops: set[str] = set()

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(function, fullgraph=True, backend=look)(*function.inputs)
    assert f"recattn_kernels.{spec.name}.default" in ops

    compiled = torch.compile(function, fullgraph=True)
    expected, outputs = function(*function.inputs), compiled(*function.inputs)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        torch.autograd.grad(sum(o.sum() for o in outputs), function.inputs),
        torch.autograd.grad(sum(o.sum() for o in expected), function.inputs),
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("op", "gates"), [(indrnn, 0), (rnn, 1), (gru, 3), (lstm, 4)])
def test_compile_of_a_reference_that_clips(op: Callable[..., Any], gates: int) -> None:
    x = torch.randn(3, 2, 5 * max(gates, 1), requires_grad=True)
    weight = torch.randn(5 * gates, 5) if gates else torch.rand(5)

    def call(x: Tensor) -> Tensor:
        output: Tensor = op(x, weight, grad_clip=0.1, backend="reference")[0]
        return output

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, call))
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("spec", OP)
def test_one_compilation_serves_every_size(spec: OpSpec) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=True, backend=counter)
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample, torch.float32)
    for size in (5, 7, 11):
        args = (torch.randn(size, size + 1, *x.shape[2:]), *rest) if spec.sized is None else spec.sized(size)
        torch.testing.assert_close(compiled(*args, **kwargs), spec.function(*args, **kwargs))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("spec", OP)
def test_compiled_code_follows_use_backend(spec: OpSpec) -> None:
    sample = next(s for s in spec.samples if s.name == "plain")
    args, kwargs = arguments(sample, torch.float32)
    compiled = torch.compile(spec.function, fullgraph=True, backend="eager")
    compiled(*args, **kwargs)
    # Dynamo wraps what is raised while it traces; the message comes through.
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        compiled(*args, **kwargs)
    compiled(*args, **kwargs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_follows_the_precision_of_products() -> None:
    """What slot_attention asks on a GPU while it is traced: how torch multiplies float32 there."""
    compiled = torch.compile(lambda x: x + backends.allows_tf32(), fullgraph=True, backend="eager")
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", 0.0), ("high", 1.0)):
            torch.set_float32_matmul_precision(precision)
            assert compiled(torch.zeros(())).item() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


class Module(torch.nn.Module):
    """The op behind a trainable scale."""

    def __init__(self, spec: OpSpec, rest: list[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.kwargs = spec, kwargs
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rest = torch.nn.ParameterList(rest)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.spec.function(x * self.scale, *self.rest, **self.kwargs)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("spec", OP)
def test_exported_program_trains(spec: OpSpec) -> None:
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample, torch.float32)
    module = Module(spec, rest, kwargs)
    exported = torch.export.export(module, (x.detach(),)).module()
    for m in (module, exported):
        sum(o.sum() for o in m(x.detach())).backward()
    for (name, p), q in zip(module.named_parameters(), exported.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
        p.grad = q.grad = None


class OfItsInputsSizes(torch.nn.Module):
    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        glimpses = glimpse(image, image.new_zeros(2, 2), image.shape[-1] // 2)
        return glimpses, rnn(x, x.new_ones(5, 5), lengths=[x.shape[0], 2])[0]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_sizes_that_change(strict: bool) -> None:
    def inputs(width: int, T: int) -> tuple[Tensor, ...]:
        return torch.rand(2, 1, 9, width), torch.randn(T, 2, 5)

    width, T = (torch.export.Dim(name, min=4, max=64) for name in ("width", "T"))
    model = OfItsInputsSizes()
    exported = torch.export.export(model, inputs(10, 6), dynamic_shapes=({3: width}, {0: T}), strict=strict).module()
    others = inputs(14, 8)
    torch.testing.assert_close(exported(*others), model(*others))


class Subclass(torch.Tensor):
    """With the __torch_function__ of every subclass that does not write its own."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("spec", OP)
def test_torch_function(spec: OpSpec) -> None:
    """As one of torch's own functions: a mode sees one call, a subclass stays one, torch.fx makes it one node."""
    (x, *rest), kwargs = arguments(next(s for s in spec.samples if s.name == "plain"), torch.float32)
    seen = []

    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Log():
        expected = spec.function(x, *rest, **kwargs)
    assert seen == [spec.function]
    results = tensors(spec.function(x.detach().as_subclass(Subclass), *rest, **kwargs))
    compiled = torch.compile(spec.function, backend="eager", fullgraph=True)
    results += tensors(compiled(x.detach().as_subclass(Subclass), *rest, **kwargs))
    assert all(type(t) is Subclass for t in results)
    graph = torch.fx.symbolic_trace(lambda x: spec.function(x, *rest, **kwargs))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [spec.function]
    plain = [t.as_subclass(Tensor) for t in (*results, *tensors(graph(x)))]
    torch.testing.assert_close(plain, 3 * tensors(expected), rtol=0, atol=0)


def test_constants_are_marked_as_torch_marks_them() -> None:
    ours, torchs = backends.constant_when_compiled(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(torchs) != {}
