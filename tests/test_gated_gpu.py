"""rnn, lstm and gru in CUDA at sizes that real calls have, over many blocks: what the samples, and threads that a CPU
emulates, do not show."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from recattn_kernels import conformance, registry
from recattn_kernels.ops import gpu
from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.gated.spec import Samples
from recattn_kernels.spec import Sample, cast, tensors

pytestmark = pytest.mark.cuda

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
# T, B, H: several slices of the units and groups of the rows; rows in more than one pass; the widest that fits.
PLAIN, NORMED, ORIGINAL = "plain", "layer_norm", "reset_after=False"
SIZES = [
    ("lstm", PLAIN, torch.bfloat16, (64, 50, 512)),
    ("lstm", NORMED, torch.bfloat16, (64, 50, 512)),
    ("gru", ORIGINAL, torch.bfloat16, (64, 50, 512)),
    ("lstm", PLAIN, torch.float32, (24, 50, 512)),
    ("lstm", NORMED, torch.float32, (24, 50, 512)),
    ("gru", PLAIN, torch.bfloat16, (64, 50, 512)),
    ("gru", NORMED, torch.bfloat16, (16, 64, 1024)),
    ("gru", PLAIN, torch.float32, (8, 300, 512)),
    ("gru", ORIGINAL, torch.float32, (8, 300, 512)),
    ("lstm", PLAIN, torch.float16, (8, 300, 512)),
    ("rnn", PLAIN, torch.bfloat16, (16, 64, 1024)),
    ("rnn", NORMED, torch.float16, (8, 300, 512)),
    ("gru", PLAIN, torch.bfloat16, (16, 64, 1024)),
]
# What a cluster of a GPU with 132 multiprocessors holds, whether or not the plan would take one.
CLUSTERED = [
    ("gru", PLAIN, torch.bfloat16, (64, 50, 512)),
    ("gru", ORIGINAL, torch.bfloat16, (64, 300, 256)),
    ("gru", NORMED, torch.float32, (16, 50, 200)),
    ("lstm", PLAIN, torch.float16, (64, 50, 384)),
    ("lstm", NORMED, torch.bfloat16, (16, 50, 256)),
    ("lstm", PLAIN, torch.float32, (16, 50, 256)),
    ("rnn", PLAIN, torch.bfloat16, (64, 50, 1024)),
    ("rnn", PLAIN, torch.float32, (64, 300, 384)),
]
NAMES = ("op", "variant", "dtype", "sizes")
usual = pytest.mark.parametrize(NAMES, SIZES)


def arguments(
    op: str, variant: str, sizes: tuple[int, int, int], generator: Generator
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    T, B, H = sizes
    x = torch.randn(T, B, GATES[op] * H, generator=generator, dtype=torch.float64)
    weight_hh = torch.randn(GATES[op] * H, H, generator=generator, dtype=torch.float64) / H**0.5
    bias_hh = torch.randn(GATES[op] * H, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"bias_hh": bias_hh.requires_grad_()}
    if variant == NORMED:
        options["layer_norm"] = Samples(GATES[op], has_c=op == "lstm").layer_norm(generator, T, B, H)
    if variant == ORIGINAL:
        options["reset_after"] = False
    return (x.requires_grad_(), weight_hh.requires_grad_()), options


def on_gpu(op: str, variant: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> tuple[list[Tensor], Any]:
    """Inputs, and a call of them: its outputs and their gradients."""
    args, kwargs = cast(arguments(op, variant, sizes, Generator().manual_seed(0)), dtype, "cuda")
    inputs = tensors((args, kwargs))

    def call() -> list[Tensor]:
        outputs = tensors(registry.find(op).function(*args, **kwargs, backend="cuda"))
        return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]

    return inputs, call


@usual
def test_large_sizes_conform(op: str, variant: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    sample = Sample("large", functools.partial(arguments, op, variant, sizes))
    findings = conformance.compare(registry.find(op), sample, "cuda", dtype, "cuda")
    assert not [f"{f.name}: {f.complaint}" for f in findings if f.complaint is not None]


@usual
def test_every_run_gives_the_same_bits(op: str, variant: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    _, call = on_gpu(op, variant, dtype, sizes)
    first = call()
    stream = torch.cuda.Stream()
    for _ in range(10):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # beside the next call, on the default stream
            beside = call()
        here = call()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, beside, here, strict=True))


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every plan is one of clusters."""
    if launch_plan.cluster_limit(gpu.gpu_of(torch.device("cuda", 0))) < launch_plan.LARGEST:
        pytest.skip("this GPU has no clusters of 16 blocks")
    every = launch_plan.candidates
    monkeypatch.setattr(launch_plan, "candidates", lambda *args: (plan for plan in every(*args) if plan.cluster))
    launch_plan.launch_plan.cache_clear()
    yield
    launch_plan.launch_plan.cache_clear()


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize(NAMES, CLUSTERED)
def test_clusters(op: str, variant: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    test_large_sizes_conform(op, variant, dtype, sizes)
    test_every_run_gives_the_same_bits(op, variant, dtype, sizes)


def test_lengths_of_the_host_are_refused_in_a_graph() -> None:
    x, weight_hh = torch.randn(4, 2, 8, device="cuda"), torch.randn(8, 8, device="cuda")
    refused = pytest.raises(ValueError, match="rnn: lengths must be on cuda:0 while a CUDA graph is captured, got cpu")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        registry.find("rnn").function(x, weight_hh, lengths=[4, 2])


@pytest.mark.parametrize(("op", "variant", "dtype", "sizes"), SIZES[:3])
def test_a_sequence_in_a_cuda_graph(op: str, variant: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    inputs, call = on_gpu(op, variant, dtype, sizes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for _ in range(3):
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        torch.testing.assert_close(found, call(), rtol=0, atol=0)
