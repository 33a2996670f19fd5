"""Triton's own code for launching, down to a driver that writes down what it is given."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import test_aot
import torch

# Of devices that no machine has, one for each test: Triton remembers for each how it launches.
INDICES = itertools.count(100)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Grid, stream, name and arguments of every launch, on an H200 that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found: list[tuple[Any, ...]] = []
    index = next(INDICES)

    def launcher(source: Any, metadata: Any) -> Any:
        # after the function: what a launch is described by, to hooks
        return lambda x, y, z, stream, function, *rest: found.append(((x, y, z), stream, function, rest[4:]))

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 2**10},
        load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
    )
    fake = SimpleNamespace(
        get_current_device=lambda: index, get_current_stream=lambda device: ("of torch", device), utils=utils,
        get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=launcher,
    )  # fmt: skip
    monkeypatch.setattr(driver, "_active", fake)
    return found


@test_aot.needs_compiler
@pytest.mark.parametrize("options", ["plain", "normed"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_later_steps_are_launched_as_the_first(
    options: str, steps: int, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recattn_kernels.ops.gated import triton_aot
    from recattn_kernels.triton_launch import Launch, run_steps

    bound, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, **moved: (bound.append(self), run(self, **moved))[1])
    F16 = torch.float16
    cell = "gru_before" if options == "plain" else "lstm"
    of_a_step = triton_aot.example(cell, triton_aot.Shape(F16, F16, 512, options), triton_aot.machine(32))

    def same(given: Any, by_name: Any) -> bool:
        """As the launches after the first are given addresses in the place of tensors."""
        if isinstance(by_name, torch.Tensor) and isinstance(given, int):
            return given == by_name.data_ptr()
        return given is by_name or (isinstance(given, int) and given == by_name)

    for launches in of_a_step:
        assert len(launches) == 2
        for launch in launches:  # tensors that have addresses
            for name, x in launch.args.items():
                if isinstance(x, torch.Tensor):
                    launch.args[name] = torch.empty_like(x, device="cpu")
        for i in range(steps):
            for launch in launches:
                launch.run(i=i)
        expected = launched.copy()
        launched.clear()
        bound.clear()
        run_steps(launches, steps)
        assert bound == list(launches) * (steps > 0)
        assert len(launched) == len(expected) == 2 * steps
        for n, ((*where, args), (*there, values)) in enumerate(zip(launched, expected, strict=True)):
            assert where == there
            assert where[1][0] == "of torch"
            assert all(same(a, b) for a, b in zip(args, values, strict=True))
            # Of a tensor Triton asks the driver, in every launch.
            assert any(isinstance(a, torch.Tensor) for a in args) == (n < len(launches))
        launched.clear()


@test_aot.needs_triton
def test_both_backends_know_the_same_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn_kernels.ops.gpu import gpu_of
    from recattn_kernels.triton_launch import Machine, machine

    h200 = SimpleNamespace(
        multi_processor_count=132, warp_size=32, major=9, minor=0, shared_memory_per_block_optin=227 * 2**10
    )
    mi300 = SimpleNamespace(multi_processor_count=304, warp_size=64, major=9, minor=4)
    for properties, shared in ((h200, 227 * 2**10), (mi300, 2**16)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        device = torch.device("cuda", next(INDICES))
        gpu = gpu_of(device)
        assert gpu == (properties.multi_processor_count, shared, (9, properties.minor), properties.warp_size)
        x: Any = SimpleNamespace(device=device)
        assert machine(x) == Machine(properties.warp_size, properties.multi_processor_count, shared)


@pytest.mark.interpret
def test_without_a_compiler_every_step_is_launched_by_name() -> None:
    from recattn_kernels.triton_launch import Launch, run_steps

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **args: launched.append((self.name, grid, args["x"], args["i"]))

    launched: list[tuple[Any, ...]] = []
    launches = [Launch(Kernel(name), (2, 3), {"x": 1.0, "i": 0}, 4, 255) for name in "ab"]
    run_steps(launches, 3)
    assert launched == [(name, (2, 3), 1.0, i) for i in range(3) for name in "ab"]


@test_aot.needs_triton
def test_a_call_needs_nothing_of_ahead_of_time_compilation() -> None:
    """Which reaches into Triton for names that a release may change."""
    code = """
import torch, triton.backends.compiler, triton.compiler, triton.runtime.jit as jit
from recattn_kernels import indrnn
del jit.create_function_from_signature, triton.compiler.ASTSource, triton.compiler.make_backend
del triton.backends.compiler.GPUTarget
indrnn(torch.ones(2, 3, 4), torch.ones(4), backend="triton")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
