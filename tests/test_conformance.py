"""Every backend of every op, in every dtype, on every sample, against the float64 reference, by the one rule of
recattn_kernels/conformance.py, which no test loosens."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch

from recattn_kernels import backends, conformance
from recattn_kernels.registry import OPS
from recattn_kernels.spec import OpSpec, Sample, cast, tensors

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def runs() -> Iterator[tuple[OpSpec, str, str, list[Any]]]:
    """op, backend, device, and the marks of a machine that can run it."""
    for spec in OPS:
        for backend in ("reference", *spec.backends):
            if backend in ("reference", "cpp"):
                yield spec, backend, "cpu", []
            if backend == "triton":
                yield spec, backend, "cpu", [pytest.mark.interpret]
            if backend in ("reference", "triton", "cuda"):
                yield spec, backend, "cuda", [pytest.mark.cuda]


def cases() -> Iterator[Any]:
    for spec, backend, device, marks in runs():
        for dtype in spec.dtypes[backend]:
            for sample in spec.samples:
                name = f"{spec.name}-{backend}-{device}-{str(dtype).removeprefix('torch.')}-{sample.name}"
                yield pytest.param(spec, backend, device, dtype, sample, id=name, marks=marks)


def variants(dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    """The sample with every argument, on each backend."""
    return [
        pytest.param(spec, backend, device, dtype, sample, marks=marks, id=f"{spec.name}-{backend}-{device}-{dtype}")
        for spec, backend, device, marks in runs()
        for dtype in spec.dtypes[backend]
        if dtype in dtypes
        for sample in spec.samples
        if sample.name == "everything"
    ]


def single_outputs() -> Iterator[Any]:
    """Those in float32 with each of the op's outputs, if it has several."""
    counts = {}
    for spec in OPS:
        args, kwargs = next(s for s in spec.samples if s.name == "everything").make(torch.Generator().manual_seed(0))
        counts[spec.name] = len(tensors(spec.function(*args, **kwargs, backend="reference")))
    for case in variants((torch.float32,)):
        count = counts[case.values[0].name]
        for used in range(count) if count > 1 else ():
            yield pytest.param(*case.values, used, marks=case.marks, id=f"{case.id}-{used}")


def skip_where_unavailable(spec: OpSpec, backend: str, device: str, dtype: torch.dtype, sample: Sample) -> None:
    """A backend that this machine lacks is a skip with its reason; so is one that refuses a sample and is to refuse it.
    Any other refusal, and none where there should be one, is a failure."""
    reason = backends.machine_refusal(backend, device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    args, kwargs = spec.arguments(sample, dtype, device)
    refused = backends.explain(spec.name, *args, **kwargs)[backend]
    if backend in sample.refused_by:
        assert refused is not None
        pytest.skip(f"{backend}: {refused}")
    assert refused is None, refused


def judge(findings: list[conformance.Finding]) -> None:
    assert findings
    wrong = [f"{f.name}: {f.complaint}" for f in findings if f.complaint is not None]
    assert not wrong, wrong


@pytest.mark.parametrize(("spec", "backend", "device", "dtype", "sample"), list(cases()))
def test_conforms(spec: OpSpec, backend: str, device: str, dtype: torch.dtype, sample: Sample) -> None:
    skip_where_unavailable(spec, backend, device, dtype, sample)
    judge(conformance.compare(spec, sample, backend, dtype, device))


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
@pytest.mark.parametrize(("spec", "backend", "device", "dtype", "sample"), variants((torch.float32, torch.bfloat16)))
def test_any_layout_of_the_output_gradient(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype, sample: Sample, layout: str
) -> None:
    skip_where_unavailable(spec, backend, device, dtype, sample)
    judge(conformance.compare(spec, sample, backend, dtype, device, layout=layout))


@pytest.mark.parametrize(("spec", "backend", "device", "dtype", "sample", "used"), list(single_outputs()))
def test_one_output_used(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype, sample: Sample, used: int
) -> None:
    skip_where_unavailable(spec, backend, device, dtype, sample)
    judge(conformance.compare(spec, sample, backend, dtype, device, used=[used]))


@pytest.mark.parametrize(("spec", "backend", "device", "dtype", "sample"), variants(SIXTEEN_BIT))
def test_float32_parameters_beside_sixteen_bit_x(
    spec: OpSpec, backend: str, device: str, dtype: torch.dtype, sample: Sample
) -> None:
    skip_where_unavailable(spec, backend, device, dtype, sample)
    judge(conformance.compare(spec, sample, backend, dtype, device, mixed=True))


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in OPS])
def test_every_op_has_the_samples_that_tests_ask_for(spec: OpSpec) -> None:
    names = [sample.name for sample in spec.samples]
    assert len(set(names)) == len(names)
    assert {"plain", "everything"} <= set(names)


def test_the_rule_can_fail() -> None:
    """A kernel that is wrong in one element of one gradient by a few units in the last place does not conform."""
    spec = OPS[0]
    sample = next(s for s in spec.samples if s.name == "everything")
    args, kwargs = cast(sample.make(torch.Generator().manual_seed(0)), torch.float32, "cpu")
    results = []
    for value in (args, conformance.exactly(args)):
        options = kwargs if value is args else conformance.exactly(kwargs)
        outputs = spec.function(*value, **options, backend="reference")
        results.append(conformance.evaluate(spec.function, value, options, [torch.ones_like(o) for o in outputs]))
    reference, exact = results
    names = conformance.input_names(spec.function, args, kwargs)
    judge(conformance.judge(reference, reference, exact, names, torch.float32))
    grad = reference.grads[0]
    assert grad is not None
    spoiled = grad.clone()
    spoiled[0, 0, 0] += 40 * torch.finfo(torch.float32).eps * grad.abs().max()
    actual = conformance.Result(reference.outputs, [spoiled, *reference.grads[1:]])
    findings = conformance.judge(actual, reference, exact, names, torch.float32)
    assert [f.name for f in findings if f.complaint] == ["grad x"]


def test_accurate_product_is_the_exact_one_rounded() -> None:
    a, b = torch.randn(3, 50, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    exact = [[float(sum(Fraction(x) * Fraction(y) for x, y in zip(r, c, strict=True))) for c in b.t().tolist()]
             for r in a.tolist()]  # fmt: skip
    assert torch.equal(conformance.accurate_product(a, b), torch.tensor(exact, dtype=torch.float64))
    a[0, 0] = float("inf")
    assert torch.equal(conformance.accurate_product(a, b)[0], (a @ b)[0])
