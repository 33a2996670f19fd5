"""slot_attention of the same inputs several times, whose backward leaves dk and dv to one pass, or adds them up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recattn_kernels import SlotAttention, backends, conformance, slot_attention
from recattn_kernels.ops.slot_attention import repeated as module
from recattn_kernels.ops.slot_attention.api import normalise
from recattn_kernels.ops.slot_attention.repeated import repeated
from recattn_kernels.spec import cast, tensors

TIMES = 3
pytestmark = pytest.mark.usefixtures("absorbing")
BACKENDS = ["cpp", pytest.param("triton", marks=pytest.mark.interpret)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """B, K, N, D, Dv; Dv None: k itself is the values."""

    sizes: tuple[int, int, int, int, int | None]
    heads: int = 0
    bias: bool = False
    masks: bool = False
    options: Mapping[str, Any] = {}

    def make(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        B, K, N, D, Dv = self.sizes
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        lead = (B, self.heads) if self.heads else (B,)
        q, k = randn(*lead, K, D), randn(*lead, N, D)
        v, bias = None if Dv is None else randn(*lead, N, Dv), randn(*lead, K) if self.bias else None
        options = dict(self.options)
        if self.masks:
            options["slot_mask"] = torch.rand(B, K, generator=generator) < 0.7
            options["input_mask"] = torch.rand(B, N, generator=generator) < 0.7
            options["input_mask"][-1, :5] = False
        return (q, k, v, bias), options


CASES = {
    "k_alone": Case((1, 5, 70, 16, None)),
    "everything": Case((2, 5, 40, 20, 9), heads=2, bias=True, masks=True, options={"eps": 1e-2, "scale": 0.3}),
    "denominator": Case((1, 7, 40, 20, 70), masks=True, options={"eps": 1e-2, "eps_mode": "denominator"}),
    "wide": Case((1, 20, 33, 70, None), bias=True),
}


def chain(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Each call's query, and from the second on its bias, follow from the call before; the last call's updates, and a
    sum of all queries."""
    attend = repeated(k, v, TIMES, **options)
    total = q
    for _ in range(TIMES):
        updates, attn = attend(q, bias, False)
        assert attn is None
        some = min(q.shape[-1], updates.shape[-1])
        q = q + torch.nn.functional.pad(updates[..., :some], (0, q.shape[-1] - some)).tanh()
        bias = None if bias is None else bias + updates.mean(-1)
        total = total + q
    return updates, total


def judge(function: Callable[..., Any], case: Case, backend: str, dtype: torch.dtype) -> None:
    """That function's outputs and their gradients on backend conform to those on the reference."""
    args, kwargs = cast(case.make(), dtype, "cpu")
    reference = {"backend": "reference"}
    outputs = tensors(function(*args, **kwargs, **reference))
    flow = conformance.output_gradients(outputs, torch.Generator().manual_seed(1))
    plain = conformance.evaluate(function, args, kwargs | reference, flow)
    exact_args, exact_kwargs = conformance.exactly(args), conformance.exactly(kwargs)
    exact = conformance.evaluate(function, exact_args, exact_kwargs | reference, conformance.exactly(flow))
    actual = conformance.evaluate(function, args, kwargs | {"backend": backend}, flow)
    names = conformance.input_names(function, args, kwargs)
    findings = conformance.judge(actual, plain, exact, names, dtype)
    assert len(findings) == len(outputs) + sum(grad is not None for grad in plain.grads)
    wrong = [f"{f.name}: {f.complaint}" for f in findings if f.complaint is not None]
    assert not wrong, wrong


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that have made a pass for dk and dv."""
    made: list[str] = []

    def load(op: str, backend: str) -> Any:
        found = loaded(op, backend)

        def inputs_backward(*args: Any) -> Any:
            made.append(backend)
            return found.inputs_backward(*args)

        names = {"forward": found.forward, "backward": found.backward, "inputs_backward": inputs_backward}
        return SimpleNamespace(**names)

    loaded = backends.load
    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(module, "pays", lambda backend, call: True)
    return made


def cases() -> list[Any]:
    dtypes = {"k_alone": (F32, BF16, F16), "everything": (F32, BF16)}
    return [
        pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, case in CASES.items()
        for dtype in dtypes.get(name, (F32,))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), cases())
def test_gradients_conform(backend: str, case: Case, dtype: torch.dtype, passes: list[str]) -> None:
    judge(chain, case, backend, dtype)
    assert passes == [backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_conform(backend: str, passes: list[str]) -> None:
    case = CASES["everything"]._replace(sizes=(1, 3, 7, 4, 5), heads=0)

    def first(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, ...]:
        updates, total = chain(q, k, v, bias, **options)
        return torch.autograd.grad(updates.square().sum() + total.sin().sum(), (q, k, v, bias), create_graph=True)

    judge(first, case, backend, F32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", ["k", "v"])
def test_one_gradient_needed_and_calls_apart(backend: str, needed: str, passes: list[str]) -> None:
    """A call that nothing follows from, one that returns A, and one call fewer than were announced."""
    case = Case((1, 3, 40, 8, 12), bias=True)

    def apart(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, ...]:
        k, v = (t if name == needed else t.detach() for name, t in (("k", k), ("v", v)))
        attend = repeated(k, v, TIMES + 1, **options)
        first, _ = attend(q, bias, False)
        attend(q + 1, bias, False)
        second, attn = attend(q * 2, None, True)
        third, _ = attend(q.sin(), None, False)
        assert attn is not None
        return first, second, attn, third

    judge(apart, case, backend, F32)
    assert passes == [backend]


# Without `passes`, which has every call deferred.
@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each backward that adds to a dk: whether there was one to add to."""
    found: list[bool] = []

    def backward(self: Any, grads: Any, *rest: Any) -> Any:
        found.append(grads[1] is not None)
        return original(self, grads, *rest)

    original = module._Added._backward
    monkeypatch.setattr(module._Added, "_backward", backward)
    return found


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("sizes", [(1, 5, 70, 16, None), (2, 20, 33, 70, None)])
def test_calls_that_add_conform(sizes: Any, masks: bool, dtype: torch.dtype, added: list[bool]) -> None:
    judge(chain, Case(sizes, bias=True, masks=masks), "cpp", dtype)
    assert added == [False, True, True]


def test_calls_that_add_have_second_derivatives() -> None:
    def first(q: Tensor, k: Tensor, v: None, bias: Tensor, **options: Any) -> tuple[Tensor, ...]:
        updates, total = chain(q, k, v, bias, **options)
        return torch.autograd.grad(updates.square().sum() + total.sin().sum(), (q, k, bias), create_graph=True)

    judge(first, Case((1, 3, 7, 4, None), bias=True), "cpp", F32)


def test_calls_that_add_and_calls_apart(added: list[bool]) -> None:
    """One that nothing follows from, one that returns A, one without a gradient; backward twice, and of a batch."""
    (q, k, _, _), _ = Case((1, 3, 40, 8, None)).make()

    def total(attend: Callable[..., Any]) -> Tensor:
        first, _ = attend(q, None, False)
        attend(q + 1, None, False)
        second, attn = attend(q * 2, None, True)
        with torch.no_grad():
            attend(q, None, False)
        third, _ = attend(q.sin(), None, False)
        return first * 2 + second + third.square() + attn.square().sum()

    found = total(repeated(k, None, TIMES + 1, backend="cpp"))
    expected = total(lambda q, bias, return_attn: (*slot_attention(q, k, return_attn=True, backend="reference"),))
    grads = torch.eye(3, dtype=torch.float64)[..., None].expand(3, 3, 8).unsqueeze(1)
    for _ in range(2):
        ours = torch.autograd.grad(found, (q, k), grads[0], retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, (q, k), grads[0], retain_graph=True))
    assert added == [False, True, True] * 2
    ours = torch.autograd.grad(found, (q, k), grads, is_grads_batched=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (q, k), grads, is_grads_batched=True))


def test_misuse(passes: list[str]) -> None:
    """More calls than announced, another number of slots, and a call without a gradient between two that have one."""
    (q, k, v, _), _ = CASES["denominator"]._replace(sizes=(1, 3, 9, 4, 5), masks=False).make()
    attend = repeated(k, v, 2, backend="cpp")
    first, _ = attend(q, None, False)
    with pytest.raises(ValueError, match="q must have K = 3 slots in every call, got 1"):
        attend(q[:, :1], None, False)
    with torch.no_grad():
        attend(q, None, False)
    second, _ = attend(q * 2, None, False)
    with pytest.raises(RuntimeError, match="announced 2 calls"):
        attend(q, None, False)
    found = torch.autograd.grad((first + second.square()).sum(), (q, k, v))
    assert passes == ["cpp"]
    plain = slot_attention(q, k, v) + slot_attention(q * 2, k, v).square()
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), (q, k, v)))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_layer_makes_one_pass_and_compiles(heads: int, passes: list[str]) -> None:
    layer = SlotAttention(3, 8, heads=heads, eps_mode="denominator", backend="cpp")
    inputs = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slots = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    leaves = (inputs, *(p for name, p in layer.named_parameters() if not name.startswith("slots_")))

    def gradients(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(inputs, slots).square().sum(), leaves)

    found = gradients(layer)
    assert passes == ["cpp"]
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert passes == ["cpp", "cpp"]
    module.pays = lambda backend, call: False
    plain = gradients(layer)
    assert passes == ["cpp", "cpp"]
    for of_layer, of_compiled, of_plain in zip(found, compiled, plain, strict=True):
        torch.testing.assert_close(of_layer, of_plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_compiled, of_layer, rtol=1e-5, atol=1e-6)


def test_the_rule_on_a_cpu() -> None:
    """One pass pays where k and v are two tensors, and the slots few."""
    k = torch.randn(1, 4, 2)

    def pays(K: int, v: Tensor | None) -> bool:
        return module.pays("cpp", normalise(torch.randn(1, K, 2), k, v))

    assert [pays(7, k.clone()), pays(24, k.clone()), pays(7, None)] == [True, False, False]


def test_opcheck() -> None:
    q, k, v, bias = (torch.randn(2, n, 4).requires_grad_() for n in (3, 9, 9, 3))
    options = (0.5, 1e-8, False)
    (pending,) = module.SHARED.on("cpp", (k, v, None, None), (2, 3, *options))
    ops = torch.ops.recattn_kernels
    torch.library.opcheck(ops.slot_attention_shared.default, (k, v, None, None, 2, 3, *options, "cpp"))
    inputs = (q, k, v, bias[..., 0], None, None, pending.detach().requires_grad_())
    torch.library.opcheck(ops.slot_attention_once.default, (*inputs, *options, False, False, "cpp"))
    (flow,) = module.FLOW.on("cpp", (k,), ())
    torch.library.opcheck(ops.slot_attention_flow.default, (k, "cpp"))
    inputs = (q, k, None, bias[..., 0], None, None, flow.detach().requires_grad_())
    torch.library.opcheck(ops.slot_attention_added.default, (*inputs, *options, False, False, "cpp"))
