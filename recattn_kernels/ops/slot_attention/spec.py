"""slot_attention for the tests and the benchmarks: samples, workloads, and the least that a call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.ops.slot_attention.api import slot_attention
from recattn_kernels.ops.slot_attention.contract import BACKENDS
from recattn_kernels.spec import OpSpec, Sample, Workload


def mask(generator: Generator, B: int, size: int) -> Tensor:
    """Of each row about two thirds, of the first all, of the last none."""
    result = torch.rand(B, size, generator=generator) < 0.67
    result[0] = True
    result[-1] = B == 1
    return result


def sample(
    name: str, B: int, K: int, N: int, D: int, Dv: int | None = None, /, *, heads: int | None = None,
    bias: bool = False, slot_mask: bool = False, input_mask: bool = False,
    change: Callable[..., None] | None = None, finite: bool = True, refused_by: tuple[str, ...] = (), **options: Any,
) -> Sample:  # fmt: skip
    """Dv None: v is k. change: puts something into the arguments before they require grad."""
    lead = (B,) if heads is None else (B, heads)

    def make(generator: Generator) -> Arguments:
        kwargs = dict(options)
        tensors = [randn(generator, *lead, K, D, grad=False), randn(generator, *lead, N, D, grad=False)]
        if Dv is not None:
            tensors.append(randn(generator, *lead, N, Dv, grad=False))
        if bias:
            kwargs["bias"] = randn(generator, *lead, K, grad=False)
        if slot_mask:
            kwargs["slot_mask"] = mask(generator, B, K)
        if input_mask:
            kwargs["input_mask"] = mask(generator, B, N).flip(0)
        if change is not None:
            change(*tensors, **kwargs)
        if bias:
            kwargs["bias"].requires_grad_()
        return tuple(t.requires_grad_() for t in tensors), kwargs

    return Sample(name, make, finite=finite, refused_by=refused_by)


def masked_rubbish(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, slot_mask: Tensor, input_mask: Tensor) -> None:
    """NaN and infinity in what is masked."""
    q[~slot_mask] = float("nan")
    bias[~slot_mask] = float("inf")
    k[~input_mask] = float("inf")
    v[~input_mask] = float("nan")


def planted(value: float, where: str) -> Sample:
    def change(q: Tensor, k: Tensor, v: Tensor) -> None:
        {"q": q, "k": k, "v": v}[where][0, 1, 2] = value

    return sample(f"planted_{value}_in_{where}", 2, 3, 5, 4, 6, change=change, finite=False)


def strided(generator: Generator) -> Arguments:
    """Every second input of wider ones, their columns apart, the same keys for the whole batch; a transposed query."""
    q = randn(generator, 2, 6, 5, grad=False).transpose(1, 2)
    k = randn(generator, 1, 14, 7, grad=False)[:, ::2, 1:].expand(2, 7, 6)
    v = randn(generator, 2, 7, 18, grad=False)[..., ::2]
    return tuple(t.requires_grad_() for t in (q, k, v)), {}


def frozen(generator: Generator) -> Arguments:
    """Keys and values that need no gradient, as in all iterations but one of a layer that defers theirs."""
    (q, k, v), kwargs = sample("", 2, 4, 9, 8, 8).make(generator)
    return (q, k.detach(), v.detach()), kwargs


def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    args, kwargs = sample("", *(workload.sizes[name] for name in ("B", "K", "N", "D", "D"))).make(generator)
    return tuple(t.detach().to(device, dtype).requires_grad_() for t in args), kwargs


def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Forward: reads q, k, v, writes the updates. Backward: reads those again, writes the gradients of q, k, v."""
    B, K, N, D = (workload.sizes[name] for name in "BKND")
    small, large, product = B * K * D, B * N * D, 2 * B * K * N * D
    moved = 2 * small + 2 * large
    if backward:
        moved += 4 * small + 4 * large
    return moved * dtype.itemsize, (7 if backward else 2) * product


def sized(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, n + 1), torch.randn(n, n + 2, n + 1), torch.randn(n, n + 2, 4)


def workloads(source: str, name: str, K: int, N: int, D: int, **batch: int) -> tuple[Workload, ...]:
    """One for each device: a CPU takes smaller batches."""
    return tuple(Workload(name, {"B": B, "N": N, "K": K, "D": D}, source, (device,)) for device, B in batch.items())


SPEC = OpSpec(
    name="slot_attention",
    function=slot_attention,
    backends=tuple(BACKENDS),
    samples=(
        sample("plain", 2, 4, 9, 8, 8),
        sample(
            "everything", 3, 5, 70, 17, 9, heads=2, bias=True, slot_mask=True, input_mask=True, return_attn=True,
            head_softmax="joint", scale=0.3, eps=1e-3,
        ),
        sample(
            "heads_denominator", 3, 7, 130, 33, heads=2, slot_mask=True, input_mask=True, eps_mode="denominator",
            eps=1e-2, return_attn=True,
        ),
        sample("single", 1, 1, 1, 1, 1),
        sample("many_slots", 1, 128, 65, 20, 40, bias=True),
        sample("many_inputs", 1, 7, 600, 64),
        sample("masked_rubbish", 3, 4, 6, 5, 3, bias=True, slot_mask=True, input_mask=True, change=masked_rubbish),
        sample("no_batch", 0, 3, 4, 5, 6),
        sample("no_slots", 2, 0, 4, 5, 6, return_attn=True),
        sample("no_inputs", 2, 3, 0, 5, 6, bias=True),
        sample("no_width", 2, 3, 4, 0, 0),
        sample("no_eps", 2, 3, 4, 5, 6, eps=0.0, eps_mode="denominator", input_mask=True),
        Sample("strided", strided, smooth=False),
        Sample("frozen", frozen),
        planted(float("nan"), "q"),
        planted(float("nan"), "k"),
        planted(float("inf"), "k"),
        planted(-float("inf"), "v"),
    ),
    workloads=(
        *workloads("scenes of 128 x 128 (Locatello et al. 2020)", "clevr6", 7, 16384, 64, cpu=4, cuda=64),
        *workloads("set prediction (Locatello et al. 2020)", "set", 10, 1024, 64, cpu=32, cuda=512),
        *workloads("DINOSAUR, patches of 8", "dinosaur", 24, 784, 256, cpu=16, cuda=64),
        *workloads("features of a vision transformer", "vit", 7, 196, 256, cpu=64, cuda=64),
    ),
    inputs=inputs,
    cost=cost,
    sized=sized,
)  # fmt: skip
