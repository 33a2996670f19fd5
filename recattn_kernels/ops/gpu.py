"""What the GPU backends of every op have in common: the GPU, and how csrc/cuda is handed what it needs."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of csrc/cuda/kernels.h's enum Dtype


class Gpu(NamedTuple):
    multiprocessors: int
    shared: int  # bytes that one block may have
    capability: tuple[int, int] = (8, 0)
    lanes: int = 32  # of a warp, or of an AMD wavefront


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 2**16)  # ROCm names none: every GPU of its has 64 KB
    capability = (properties.major, properties.minor)
    return Gpu(properties.multi_processor_count, shared, capability, properties.warp_size)


def cuda() -> Any:
    return backends.extension("_cuda")


def guard(x: Tensor) -> AbstractContextManager[Any]:
    """The kernels are launched on the current device, which need not be x's."""
    return torch.cuda.device(x.device)


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def typed(x: Tensor | None) -> tuple[int, int]:
    """Pointer and type of a contiguous tensor; zeros for one that is absent or empty."""
    return (0, 0) if x is None or x.numel() == 0 else (x.data_ptr(), DTYPES.index(x.dtype))


def refusal_of_float64(call: Any) -> str | None:
    """Why kernels that compute in float32 cannot run a call."""
    return "it has no float64 kernel" if call.x.dtype == torch.float64 else None
