"""The CUDA kernels of IndRNN, the walk over time and the scan, emulated on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_conformance import judge

from recattn_kernels import conformance, registry
from recattn_kernels.ops.indrnn import spec as of_indrnn
from recattn_kernels.spec import Sample, tensors

pytestmark = pytest.mark.usefixtures("cuda_on_the_cpu")

INDRNN = registry.find("indrnn")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = ("sequential", "scan")


def tame(u: torch.Tensor) -> torch.Tensor:
    """Weights below 1: float16 holds no others' states for long."""
    return (u.detach() * 0.85).requires_grad_()


def sample(T: int, B: int, H: int, **options: Any) -> Sample:
    return of_indrnn.sample("sample", T, B, H, **{**of_indrnn.EVERYTHING, "u": tame, **options})


@pytest.mark.slow  # with the emulation's build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conforms(dtype: torch.dtype) -> None:
    for sample in INDRNN.samples:
        for mixed in (False,) if dtype == torch.float32 else (False, True):
            judge(conformance.compare(INDRNN, sample, "cuda", dtype, mixed=mixed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_long(algorithm: str, dtype: torch.dtype) -> None:
    """More chunks than the ring has and more than two tiles of the scan, the last ones not full, of few columns and of
    many, for which the ring is shorter, in pairs of 16-bit types and, if their number is odd, alone."""
    plain = {"reset": None, "lengths": None}
    for T, H, activation, more in (
        (300, 6, "relu", {}), (257, 5, "hardtanh", {"reverse": True}), (271, 6, "identity", {"grad_clip": 0.7}),
        (256, 4, "relu6", plain), (100, 70, "relu", {}), (129, 67, "relu", {"reverse": True, **plain}),
    ):  # fmt: skip
        options = {"activation": activation, "algorithm": algorithm, **more}
        judge(conformance.compare(INDRNN, sample(T, 3, H, **options), "cuda", dtype))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_bad_column_is_its_own(algorithm: str) -> None:
    """NaN, in the middle of a sequence of several tiles, and a product of weights that overflows."""

    def planted(generator: torch.Generator, T: int, B: int, H: int) -> torch.Tensor:
        x = torch.randn(T, B, H, generator=generator, dtype=torch.float64)
        x[T // 2, 1, 2] = float("nan")
        return x.requires_grad_()

    with_nan = sample(200, 2, 6, algorithm=algorithm, x=planted, finite=False, reset=None)
    steep = sample(200, 2, 6, algorithm=algorithm, activation="relu6", u=of_indrnn.steep, smooth=False)
    for sample_ in (with_nan, steep):
        judge(conformance.compare(INDRNN, sample_, "cuda", torch.float32))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_order_of_threads_gives_the_same_bits(algorithm: str) -> None:
    args, kwargs = INDRNN.arguments(sample(150, 3, 30, algorithm=algorithm), torch.float32, "cpu")
    runs = []
    for _ in range(3):
        outputs = tensors(INDRNN.function(*args, **kwargs, backend="cuda"))
        inputs = [t for t in tensors((args, kwargs)) if t.requires_grad]
        runs.append([*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
