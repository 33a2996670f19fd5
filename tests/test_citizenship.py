"""Every op behaves as a torch op does: autograd of any order, autocast, functorch, devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import recattn_kernels
from recattn_kernels import BackendUnavailableError, backends
from recattn_kernels.registry import OPS
from recattn_kernels.spec import OpSpec, Sample, cast, tensors

OP = [pytest.param(spec, id=spec.name) for spec in OPS]
SMOOTH = [
    pytest.param(spec, sample, backend, id=f"{spec.name}-{sample.name}-{backend}")
    for spec in OPS
    for sample in spec.samples
    for backend in ("reference", "cpp")
    if sample.finite and sample.smooth and backend not in sample.refused_by
]
# The samples of each op with every tensor argument that has a gradient, for the slower tests.
FULL = [
    pytest.param(spec, sample, id=f"{spec.name}-{sample.name}")
    for spec in OPS
    for sample in spec.samples
    if sample.name.endswith("everything")
]
FUSED_ON_CPU = [pytest.param(spec, id=spec.name) for spec in OPS if "cpp" in spec.backends]


def arguments(sample: Sample, dtype: torch.dtype = torch.float64) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    return cast(args, dtype, "cpu"), cast(kwargs, dtype, "cpu")


class AsFunction:
    """The op as a function of its differentiable tensors alone."""

    def __init__(self, spec: OpSpec, sample: Sample, dtype: torch.dtype = torch.float64, **extra: Any) -> None:
        self.spec, self.extra = spec, extra
        self.args, self.kwargs = arguments(sample, dtype)
        self.inputs = [t for t in tensors((self.args, self.kwargs)) if t.requires_grad]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        replaced = dict(zip(map(id, self.inputs), inputs, strict=True))

        def replace(value: Any) -> Any:
            return tuple(map(replace, value)) if isinstance(value, tuple) else replaced.get(id(value), value)

        kwargs = {key: replace(value) for key, value in self.kwargs.items()}
        return tuple(tensors(self.spec.function(*replace(self.args), **(kwargs | self.extra))))


@pytest.mark.parametrize(("spec", "sample", "backend"), SMOOTH)
def test_gradcheck(spec: OpSpec, sample: Sample, backend: str) -> None:
    function = AsFunction(spec, sample, backend=backend)
    assert torch.autograd.gradcheck(function, function.inputs, fast_mode=True)


@pytest.mark.parametrize(("spec", "sample", "backend"), SMOOTH)
def test_gradgradcheck(spec: OpSpec, sample: Sample, backend: str) -> None:
    function = AsFunction(spec, sample, backend=backend)
    assert torch.autograd.gradgradcheck(function, function.inputs, fast_mode=True)


@pytest.mark.parametrize(("spec", "sample", "backend"), [p for p in SMOOTH if "everything" in str(p.id)])
def test_third_derivative_equals_the_references(spec: OpSpec, sample: Sample, backend: str) -> None:
    results = []
    for extra in ({**spec.variants[0], "backend": "reference"}, {"backend": backend}):
        function = AsFunction(spec, sample, **extra)
        value = sum((o * o).sum() for o in function(*function.inputs))
        for _ in range(2):
            grads = torch.autograd.grad(value, function.inputs, create_graph=True)
            value = sum((g * g).sum() for g in grads)
        results.append(torch.autograd.grad(value, function.inputs))
    torch.testing.assert_close(*results)


def alone(op: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An output as a function of an input that it does not depend on, and that input."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if op == "slot_attention":
        q, k = new(2, 3, 4), new(2, 5, 4)
        return lambda v: recattn_kernels.slot_attention(q, k, v, return_attn=True, backend="cpp")[1], new(2, 5, 6)
    if op == "additive_attention":
        q, k, w = new(2, 4), new(2, 5, 4), new(4)
        call = recattn_kernels.additive_attention
        return lambda values: call(q, k, w, values, return_weights=True, backend="cpp")[1], new(2, 5, 6)
    x, weight_hh, state, norm = new(1, 2, 12), new(12, 3), (new(2, 3), new(2, 3)), (new(12), new(12))

    def c_n(weight_c: Tensor) -> Tensor:  # the norm of c is of what h is made of
        layer_norm = (*norm, weight_c, weight_c)
        return recattn_kernels.lstm(x, weight_hh, state, layer_norm=layer_norm, backend="cpp")[1][1]

    return c_n, new(3)


@pytest.mark.parametrize("op", ["slot_attention", "additive_attention", "lstm"])
def test_derivative_by_an_input_without_influence(op: str) -> None:
    function, x = alone(op)
    x.requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x)
    (again,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(again.sum(), x, allow_unused=True)
    assert not first.any() and not again.any() and second is None
    assert again.shape == x.shape and again.dtype == x.dtype


@pytest.mark.parametrize("clip", [0.3, 2.0])
def test_second_derivative_over_a_clip(clip: float) -> None:
    """Samples that clip are not smooth. What reaches a state by act'(state) is not clamped."""
    spec = next(spec for spec in OPS if spec.name == "indrnn")
    sample = next(sample for sample in spec.samples if sample.name == "everything")
    results = []
    for backend in ("reference", "cpp"):
        function = AsFunction(spec, sample, backend=backend, grad_clip=clip, activation="tanh")
        grads = torch.autograd.grad(
            sum(o.sum() for o in function(*function.inputs)), function.inputs, create_graph=True
        )
        results.append(torch.autograd.grad(sum((g * g).sum() for g in grads), function.inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("spec", "sample"), FULL)
def test_checkpointed(spec: OpSpec, sample: Sample) -> None:
    """Saved tensors are read once: whoever gives them may compute them anew for it."""
    function = AsFunction(spec, sample, torch.float32)
    results = []
    for call in (function, lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)):
        results.append(torch.autograd.grad(sum(o.sum() for o in call(*function.inputs)), function.inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("spec", "sample"), FULL)
def test_opcheck(spec: OpSpec, sample: Sample) -> None:
    """Of the registered ops, as the public function calls them."""
    function = AsFunction(spec, sample, torch.float32)
    recorded: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "recattn_kernels":
                recorded.append((op, args))
            return op(*args, **(kwargs or {}))

    with Record():
        outputs = function(*function.inputs)
        torch.autograd.grad(sum(o.sum() for o in outputs), function.inputs)
    assert {op.name() for op, _ in recorded} == {
        f"recattn_kernels::{spec.name}",
        f"recattn_kernels::{spec.name}_backward",
    }
    for op, args in recorded:
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        if not op.name().endswith("_backward"):
            detached = [a.requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in detached]
        torch.library.opcheck(op, tuple(detached))


@pytest.mark.parametrize("spec", OP)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(spec: OpSpec, dtype: torch.dtype) -> None:
    """Under autocast a projection gives a 16-bit x beside float32 parameters."""
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample, torch.float32)
    weight = torch.eye(x.shape[-1], requires_grad=True)
    with torch.autocast("cpu", dtype):
        outputs = tensors(spec.function(x @ weight, *rest, **kwargs))
    plain = tensors(spec.function(x.to(dtype), *rest, **kwargs, backend="reference"))
    assert [o.dtype for o in outputs] == [o.dtype for o in plain]
    grads = torch.autograd.grad(sum(o.float().sum() for o in outputs), [weight, *rest])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("spec", OP)
def test_vmap(spec: OpSpec) -> None:
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample)
    many = torch.stack([x, x * 2, x - 1]).detach()
    got = tensors(torch.vmap(lambda x: spec.function(x, *rest, **kwargs))(many))
    for i, x in enumerate(many):
        torch.testing.assert_close([o[i] for o in got], tensors(spec.function(x, *rest, **kwargs)))


@pytest.mark.parametrize("spec", OP)
def test_func_grad_and_jvp(spec: OpSpec) -> None:
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample)
    direction = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        return sum(o.square().sum() for o in tensors(spec.function(x, *rest, **kwargs)))

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    _, along = torch.func.jvp(loss, (x.detach(),), (direction,))
    torch.testing.assert_close(along, (expected * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        along = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(along, (expected * direction).sum())


@pytest.mark.parametrize("spec", FUSED_ON_CPU)
def test_a_fused_backend_refuses_a_transform(spec: OpSpec) -> None:
    sample = next(s for s in spec.samples if s.name == "plain")
    (x, *rest), kwargs = arguments(sample)
    with pytest.raises(BackendUnavailableError, match="only the reference runs under a functorch"):
        torch.vmap(lambda x: spec.function(x, *rest, **kwargs, backend="cpp"))(x.detach()[None])


@pytest.mark.parametrize("spec", OP)
def test_meta_tensors_have_the_shapes(spec: OpSpec) -> None:
    for sample in spec.samples:
        args, kwargs = arguments(sample, torch.float32)
        expected = spec.function(*args, **kwargs, backend="reference")
        got = spec.function(*cast(args, torch.float32, "meta"), **cast(kwargs, torch.float32, "meta"))
        for a, b in zip(tensors(got), tensors(expected), strict=True):
            assert a.shape == b.shape, sample.name
            assert a.dtype == b.dtype, sample.name


@pytest.mark.parametrize(("spec", "sample"), [p for p in FULL if "cpp" not in p.values[1].refused_by])
def test_the_default_device_has_no_say(spec: OpSpec, sample: Sample) -> None:
    """What an op makes for itself is where its inputs are."""
    function = AsFunction(spec, sample, torch.float32, backend="cpp")
    if function.kwargs.get("lengths") is not None:
        function.kwargs["lengths"] = function.kwargs["lengths"].tolist()
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            outputs = function(*function.inputs)
            results.append((outputs, torch.autograd.grad(sum(o.sum() for o in outputs), function.inputs)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("spec", FUSED_ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_large_temporary(spec: OpSpec, dtype: torch.dtype) -> None:
    """A fused call allocates its results and less than half of them besides, in a backward what the op declares; and
    its parameters and states once more, in the type of the arithmetic, each way."""
    workload = spec.workloads[0]
    args, kwargs = spec.inputs(workload, dtype, "cpu", torch.Generator().manual_seed(0))
    parameters = 4 * sum(t.numel() for t in tensors((args[1:], kwargs))) if dtype != torch.float32 else 0

    def allocated(run: Any) -> tuple[int, int]:
        """Bytes, and those of the results."""
        with torch.profiler.profile(profile_memory=True) as profile:
            results = tensors(run())
        size = sum(t.nbytes for t in results)
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()), size

    with torch.no_grad():
        forward, size = allocated(lambda: spec.function(*args, **kwargs, backend="cpp"))
    assert size <= forward < 1.5 * size + 2 * parameters
    outputs = tensors(spec.function(*args, **kwargs, backend="cpp"))
    grad, inputs = torch.randn_like(outputs[0]), [t for t in tensors((args, kwargs)) if t.requires_grad]
    backward, size = allocated(lambda: torch.autograd.grad(outputs[0], inputs, grad))
    assert size <= backward < (1 + spec.scratch) * size + 2 * parameters


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("spec", FUSED_ON_CPU)
def test_inference_tensors_take_the_short_way(spec: OpSpec, first: bool) -> None:
    """Past the dispatcher, as ordinary tensors do, whichever of both the process has met first."""
    backends._plain.clear()
    with torch.inference_mode(first):
        assert not backends.dispatches(torch.zeros(1))
    sample = next(s for s in spec.samples if s.name == "everything")
    ordinary = arguments(sample, torch.float32)
    with torch.no_grad():
        expected = tensors(spec.function(*ordinary[0], **ordinary[1], backend="cpp"))
    with torch.inference_mode():
        inference = cast(ordinary, torch.float32, "cpu")
        for args, kwargs in (ordinary, inference):
            assert not backends.dispatches(*tensors((args, kwargs)))
            outputs = tensors(spec.function(*args, **kwargs, backend="cpp"))
            assert all(o.is_inference() for o in outputs)
            torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    with torch.no_grad():
        outputs = tensors(spec.function(*inference[0], **inference[1], backend="cpp"))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert not any(o.is_inference() for o in outputs)  # as what torch's own ops make of them outside that mode


@pytest.mark.parametrize("value", ["reference", "tpu"])
def test_environment_variable(value: str) -> None:
    code = "import recattn_kernels.backends as b; print(b.requested('op', None))"
    for command in (["-c", code], ["-m", "recattn_kernels", "info"]):
        env = {**os.environ, "RECATTN_BACKEND": value}
        run = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        if value == "reference":
            assert run.returncode == 0 and "reference" in run.stdout
            continue
        what = f"RECATTN_BACKEND must be one of {', '.join(backends.NAMES)}, got 'tpu'"
        if command[0] == "-c":
            assert run.returncode == 1 and f"ValueError: op: {what}" in run.stderr
        else:  # a user's error is one line
            assert run.returncode == 2 and run.stderr == f"recattn: info: {what}\n" and not run.stdout
