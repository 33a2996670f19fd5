"""The workloads under pytest-benchmark, for its comparison and history: pytest benchmarks --benchmark-autosave

`recattn bench` is the measurement that is published: it times peers in turn and checks results first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recattn_kernels import registry
from recattn_kernels.bench import peers, runner, timing
from recattn_kernels.spec import OpSpec, Workload

CASES = [
    pytest.param(spec, workload, backend, device, id=f"{spec.name}-{workload.name}-{device}-{backend}")
    for spec in registry.OPS
    for workload in spec.workloads
    for device in workload.devices
    for backend in (*spec.backends, "reference")
]


@pytest.mark.parametrize("pass_", runner.PASSES)
@pytest.mark.parametrize(("spec", "workload", "backend", "device"), CASES)
@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=True, warmup_iterations=1)
def test_op(benchmark: Any, spec: OpSpec, workload: Workload, backend: str, device: str, pass_: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    timing.keep_freed_memory(reserve=2 * spec.cost(workload, torch.float32, True)[0])
    args, kwargs = spec.inputs(workload, torch.float32, device, torch.Generator().manual_seed(0))
    case = peers.Case(spec, workload, torch.float32, device, args, kwargs, compile=False)
    impls, refused = peers.build(case, backend=None)
    if backend in refused:
        pytest.skip(refused[backend])
    call = runner.caller(pass_, next(impl for impl in impls if impl.name == backend), 0, {})

    def finished() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{spec.name} {workload.name} {device} {pass_}"
    benchmark(finished)
