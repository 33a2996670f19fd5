"""What is timed: a workload with its inputs, and the rows that call something on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.conformance import differentiable
from recattn_kernels.spec import OpSpec, Workload

Cost = Callable[[bool], tuple[int, int]]

# A peer may be off by so many times what a kernel may: the rule of conformance.py is no promise of its own.
PEER_SLACK = 100.0


@dataclass(frozen=True)
class Impl:
    """One row to be: a call, and what it should compute."""

    name: str
    call: Callable[[], Any]
    args: tuple[Any, ...]  # those that require grad are what a backward differentiates by
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    # The same in plain PyTorch, of args and kwargs. None: there is nothing to check, as the row is the reference
    # itself, a yardstick, or another model.
    definition: Callable[..., Any] | None = None
    slack: float = 1.0  # how many times the error that the rule allows may be found
    cost: Cost | None = None  # whether with backward -> bytes, FLOPs; None: the op's own
    ours: bool = False  # if it fails, the package has failed
    may_refuse: bool = False  # a layer on a backend asked for by name, which may have no kernel for all of it

    @property
    def inputs(self) -> list[Tensor]:
        return differentiable(self.args, dict(self.kwargs))


@dataclass(frozen=True)
class Case:
    """One workload, in a dtype, on a device, with its inputs."""

    spec: OpSpec
    workload: Workload
    dtype: torch.dtype
    device: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compile: bool
    unroll: int = 64  # a loop of at most so many steps is compiled whole
    sweep: bool = False  # a point of a sweep, whose inputs keep every size checkable

    def impl(self, name: str, call: Callable[..., Any], **options: Any) -> Impl:
        """A row that calls call(*args, **kwargs) of the op."""
        return Impl(name, functools.partial(call, *self.args, **self.kwargs), self.args, self.kwargs, **options)


# Cached: dynamo compiles anew for each new object and gives up after a few, so the copies of a case must share theirs.
@functools.cache
def reference_of(function: Callable[..., Any], **variant: Any) -> Callable[..., Any]:
    return functools.partial(function, backend="reference", **variant)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, dynamic=False)
    return result
