"""What an op declares about itself: samples for tests, workloads and sweeps for benchmarks, and what a call costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import checks
from recattn_kernels.ops import gpu


@dataclass(frozen=True)
class Sample:
    """A small call that shows one behaviour. Every backend must agree with the reference on it.

    make(generator) returns float64 CPU arguments (args, kwargs); `cast` brings them to a dtype and device. Floating
    tensors that require grad are those whose gradients are compared.
    """

    name: str
    make: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    finite: bool = True  # False: the values hold NaN or infinity, compared where they fall rather than by error
    smooth: bool = True  # False: on a kink, over a clip, or with elements sharing memory: no finite differences
    refused_by: tuple[str, ...] = ()  # backends that must refuse it, with a reason


@dataclass(frozen=True)
class Workload:
    """A shape that users run: sizes by name, and the devices it is meant for."""

    name: str
    sizes: Mapping[str, int]
    source: str
    devices: tuple[str, ...] = ("cpu", "cuda")


# (workload, dtype, device, generator) -> args, kwargs of the op's function
Inputs = Callable[[Workload, torch.dtype, str, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Sweep:
    """A line of time against one number: the sizes at each of its values, the smallest first, and the devices."""

    name: str
    over: str  # what the values are: the label of the axis
    sizes: Mapping[int, Mapping[str, int]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    inputs: Inputs | None = None  # None: the op's own

    def workloads(self) -> dict[int, Workload]:
        """Each value's sizes as a workload, named by them: T=64,B=4,H=128."""
        return {
            value: Workload(",".join(f"{name}={n}" for name, n in sizes.items()), sizes, f"sweep {self.name}")
            for value, sizes in self.sizes.items()
        }


@dataclass(frozen=True)
class OpSpec:
    """One op: its function, its backends, its samples, workloads and sweeps.

    Tests that need one sample alone ask for it by its name, and every op has both: "plain", of the required arguments
    alone, and "everything", of as many others as go together.
    """

    name: str
    function: Callable[..., Any]
    backends: tuple[str, ...]  # the fused ones, in the order that auto tries them
    samples: tuple[Sample, ...]
    workloads: tuple[Workload, ...]
    inputs: Inputs
    # (workload, dtype, backward) -> least bytes to move, floating-point operations
    cost: Callable[[Workload, torch.dtype, bool], tuple[int, int]]
    # n -> float32 arguments of a size of their own. None: those of the sample "plain" will do, the first at another
    # size of its first two dimensions.
    sized: Callable[[int], tuple[Any, ...]] | None = None
    scratch: float = 0.5  # what a fused backward may allocate beyond its results, as a share of them
    sweeps: tuple[Sweep, ...] = ()
    # Keyword arguments of function, each a line of its own in a sweep for every backend that takes them. The first are
    # those by which the reference defines the op.
    variants: tuple[Mapping[str, Any], ...] = ({},)
    wide: bool = False  # beside a 16-bit first argument the others are float32, and nothing else

    @property
    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        """The floating types of each backend, the reference among them: a GPU's have no float64."""
        names = ("reference", *self.backends)
        return {name: gpu.DTYPES if name in ("triton", "cuda") else checks.FLOATING for name in names}

    def arguments(
        self, sample: Sample, dtype: torch.dtype, device: str, *, mixed: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A sample's arguments in dtype on device; mixed: float32 but for the first."""
        args, kwargs = sample.make(torch.Generator().manual_seed(0))
        sixteen_bit = dtype in checks.SIXTEEN_BIT
        others = torch.float32 if mixed or (self.wide and sixteen_bit) else dtype
        return (cast(args[0], dtype, device), *cast(args[1:], others, device)), cast(kwargs, others, device)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    """The same nest with floating tensors in dtype, everything on device, strides and requires_grad kept."""
    if isinstance(value, Tensor):
        return _cast_tensor(value, dtype, device)
    if isinstance(value, Mapping):
        return {key: cast(item, dtype, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype, device) for item in value)
    return value


def _cast_tensor(value: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    # The storage is converted, so that an expanded or strided sample stays so.
    new = dtype if value.is_floating_point() else value.dtype
    source = value.detach()
    extent = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True)) if source.numel() else 0
    storage = source.as_strided((extent,), (1,)).to(device=device, dtype=new, copy=True)
    return storage.as_strided(source.shape, source.stride()).requires_grad_(value.requires_grad)
