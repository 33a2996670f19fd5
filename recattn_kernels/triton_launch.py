"""How the Triton kernels of every op are launched, and compiled ahead of time without a GPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from recattn_kernels.ops.gpu import gpu_of

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget


def kernel(function: Callable[..., None], aligned: tuple[str, ...] = ()) -> Any:
    """triton.jit for a kernel that is compiled once, whatever the sizes (one letter each), strides or alignment. Of the
    pointers named in aligned it matters whether they are multiples of 16 bytes."""
    names = list(inspect.signature(function).parameters)
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if len(name) == 1 or "_stride_" in name],
        do_not_specialize_on_alignment=[n for n in names if n.endswith("_ptr") and n not in aligned],
    )


class Machine(NamedTuple):
    """What a default configuration depends on."""

    lanes: int  # of a warp, or of an AMD wavefront
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may use
    interpreted: bool = False


# The interpreter's, so small that the tests' samples meet the configurations for few and for many columns.
INTERPRETER = Machine(lanes=32, multiprocessors=1, shared=2**17, interpreted=True)


def machine(x: Tensor) -> Machine:
    if x.device.type != "cuda":
        return INTERPRETER
    gpu = gpu_of(x.device)
    return Machine(gpu.lanes, gpu.multiprocessors, gpu.shared)


def guard(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def strided(name: str, x: Tensor | None, time: int) -> dict[str, Any]:
    """The arguments of a kernel that are a sequence: its pointer and its strides over time and the batch."""
    if x is None:
        return {f"{name}_ptr": None, f"{name}_stride_t": 0, f"{name}_stride_b": 0}
    return {f"{name}_ptr": x, f"{name}_stride_t": x.stride(time), f"{name}_stride_b": x.stride(1 - time)}


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments by name, constexprs included.

    registers is what a thread may use. NVIDIA's assembler is told: by itself it spills a few to fit one more block. On
    AMD it is only tested for, with half as many again.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    registers: int
    num_stages: int = 1
    fp_fusion: bool = True

    def options(self, backend: str) -> dict[str, Any]:
        """Of the compilation. One stage where the kernels issue their loads ahead themselves. Fused multiply-adds only
        drop a rounding: they are wanted but where a position decides which pixel is read."""
        cap = {"maxnreg": self.registers} if backend == "cuda" else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion} | cap

    def run(self, **moved: int) -> Any:
        """moved: arguments in place of those of the same name. Returns the compiled kernel, if it was compiled."""
        return self.kernel[self.grid](**(self.args | moved), **self.options("hip" if torch.version.hip else "cuda"))

    def first_step(self) -> Callable[[int], Any]:
        """Launches with i = 0, and returns what launches with any i after it, while the tensors live."""
        compiled = self.run(i=0)
        if not isinstance(compiled, CompiledKernel):  # nothing is compiled in the interpreter
            return lambda i: self.run(i=i)
        # As kernel() does not specialise on i, this is the code that run() would find again for every i. It takes all
        # of the parameters in order, and launches on torch's current stream.
        again = compiled[(*self.grid, 1, 1)[:3]]
        # Addresses: Triton would ask every tensor for its own, and the driver about that, in every step.
        given = (self.args[name] for name in self.kernel.arg_names)
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
        before = self.kernel.arg_names.index("i")
        head, tail = values[:before], values[before + 1 :]
        return lambda i: again(*head, i, *tail)

    def specialisation(self, target: GPUTarget) -> tuple[Any, ...]:
        """Options, signature, constexprs and attributes that a call with these arguments is compiled for on target.

        The tensors may be on the meta device. It is the code that a launch itself goes through: two launches with the
        same answer share one compilation.
        """
        # Imported where they are used: Triton may rename what no launch needs.
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        kwargs = self.options(target.backend) | {"debug": False}
        bound, specialisation, _ = bind(**self.args, **kwargs)
        options, *rest = self.kernel._pack_args(backend, kwargs, bound, specialisation, None)
        return (options, *rest)

    def compile(self, target: GPUTarget) -> Any:
        """The kernel compiled for target, which need not be present."""
        from triton.compiler import ASTSource

        options, signature, constexprs, attributes = self.specialisation(target)
        return triton.compile(
            ASTSource(self.kernel, signature, constexprs, attributes), target=target, options=options.__dict__
        )


def run_steps(launches: Sequence[Launch], steps: int) -> None:
    """The launches of a step, in order, for each i from 0 on.

    Triton binds and hashes every argument of a launch, which with dozens of them takes the CPU longer than a step takes
    the GPU: here it does so for the first step alone.
    """
    again = [launch.first_step() for launch in launches if steps > 0]
    for i in range(1, steps):
        for launch in again:
            launch(i)


class Variant(NamedTuple):
    """A launch that must compile for every architecture, and spill nothing."""

    name: str
    launch: Launch
    shared: int = 0  # bytes of shared memory that it may use


# What an op's triton.py declares for tests/test_aot.py: aot_variants(lanes, full) -> Variants, and aot_same(lanes) ->
# SameCompilation, groups of calls (the launches of each, in order) that must share their compilations.
Variants = Iterator[Variant]
SameCompilation = Iterator[list[tuple[Launch, ...]]]
