"""glimpse for the tests and the benchmarks: samples, workloads, a sweep, and the least that a call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.ops.glimpse.api import glimpse
from recattn_kernels.ops.glimpse.contract import BACKENDS
from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.spec import OpSpec, Sample, Sweep, Workload

Make = Callable[[Generator], Any]


def points(*shape: int, reach: float = 1.0, grad: bool = True) -> Make:
    def make(generator: Generator) -> Tensor:
        value = (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * reach
        return value.requires_grad_(grad)

    return make


def zooms(*shape: int) -> Make:
    return lambda generator: (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def sample(
    name: str, image: Make, loc: Make, size: Any, /, smooth: bool = True, finite: bool = True, zoom: Any = None,
    **kwargs: Any,
) -> Sample:  # fmt: skip
    def make(generator: Generator) -> Arguments:
        options = {"size": size, **kwargs}
        if zoom is not None:
            options["zoom"] = zoom(generator) if callable(zoom) else zoom
        return (image(generator), loc(generator)), options

    return Sample(name, make, smooth=smooth, finite=finite)


def dense(*shape: int) -> Make:
    return lambda generator: randn(generator, *shape)


def frozen(*shape: int) -> Make:
    return lambda generator: randn(generator, *shape, grad=False)


def channels_last(generator: Generator) -> Tensor:
    return randn(generator, 2, 9, 21, 3, grad=False).permute(0, 3, 1, 2).requires_grad_()


def strided(generator: Generator) -> Tensor:
    """Every second column of every image but the first, transposed."""
    return randn(generator, 3, 2, 26, 9, grad=False)[1:, :, ::2].transpose(2, 3).requires_grad_()


def expanded(generator: Generator) -> Tensor:
    return randn(generator, 1, 1, 8, 8, grad=False).expand(3, 2, 8, 8).requires_grad_()


def integers(*shape: int) -> Make:
    return lambda generator: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def constant(value: Any) -> Make:
    return lambda _: torch.tensor(value, dtype=torch.float64).requires_grad_()


def planted(generator: Generator) -> Tensor:
    """An image with a NaN and both infinities."""
    image = randn(generator, 1, 1, 12, 12, grad=False)
    image[..., 2, 3], image[..., 8, 2], image[..., 8, 9] = float("nan"), float("inf"), -float("inf")
    return image


NAN, INF = float("nan"), float("inf")

SAMPLES = (
    sample("plain", dense(3, 2, 11, 13), points(3, 2), 5),
    sample("everything", dense(2, 3, 17, 14), points(2, 3, 2), (4, 6), zoom=zooms(2, 3), scales=3, scale_factor=1.7),
    sample("border_yx", channels_last, points(2, 2, 2, reach=1.4), (3, 5), zoom=zooms(2), scales=2, padding="border",
           coords="yx"),
    sample("reflect", strided, points(2, 2, reach=1.4), (6, 3), scales=3, scale_factor=2.5, padding="reflect"),
    sample("bilinear", dense(2, 1, 9, 20), points(2, 2, 2), (5, 4), mode="bilinear", zoom=zooms(2, 2), scales=2),
    sample("bilinear_border", channels_last, points(2, 2, reach=1.4), 3, mode="bilinear", zoom=2.5, padding="border"),
    sample("bilinear_reflect", expanded, points(3, 2, reach=2.0), 4, mode="bilinear", scales=2, padding="reflect",
           smooth=False),
    sample("on_the_grid", dense(2, 1, 8, 8), constant([[0.0, 0.0], [0.25, -0.5]]), 4, scales=2, smooth=False),
    sample("small_cells", dense(2, 1, 4, 5), points(2, 2), (5, 17), zoom=zooms(2), scales=2, scale_factor=0.4),
    sample("far_outside", dense(3, 1, 6, 6), constant([[9.0, 0.1], [-1e6, 3.0], [1e30, -1e30]]), 2, smooth=False),
    sample("far_border", dense(2, 1, 6, 6), constant([[9.0, 0.1], [-1e6, 3.0]]), 2, padding="border", smooth=False),
    sample("one_pixel", dense(1, 1, 1, 1), points(1, 1, 2), 1, padding="reflect", zoom=3.0),
    sample("integers", integers(2, 3, 12, 70), points(2, 2, 2), (5, 33), scales=2,
           smooth=False),  # to float32, whatever loc is
    sample("kevinzakka", dense(3, 2, 15, 12), points(3, 2, 2, reach=1.2), 4, mode="kevinzakka", scales=3),
    sample("tf", dense(3, 2, 15, 12), points(3, 2, reach=1.2), (5, 4), mode="tf"),
    sample("dpnn", channels_last, points(2, 2, reach=1.2), (3, 4), mode="dpnn", scales=3, scale_factor=3.0),
    sample("no_images", dense(0, 2, 5, 5), points(0, 2), 3),
    sample("no_glimpses", dense(2, 2, 5, 5), points(2, 0, 2), 3),
    sample("no_pixels", dense(2, 2, 0, 5), points(2, 2), 3),
    sample("planted", planted, points(1, 4, 2, grad=False), 4, scales=2, finite=False),
    sample("bad_points", dense(1, 1, 7, 7), constant([[[NAN, 0.0], [0.3, -0.2], [0.1, INF], [0.2, 0.1], [0.4, 0.0]]]),
           3, finite=False, zoom=constant([[1.0, 1.5, 1.0, 0.0, NAN]])),
)  # fmt: skip


def ram(name: str, side: int, g: int, S: int) -> Workload:
    sizes = {"B": 128, "C": 1, "N": side, "g": g, "S": S, "G": 1}
    return Workload(name, sizes, f"Mnih et al. 2014: {side}x{side} digits, {g}x{g} glimpses at {S} scales")


def photo(name: str, B: int, device: str, **more: int) -> Workload:
    sizes = {"B": B, "C": 3, "N": 1024, "g": 64, "S": 4, "G": 8, **more}
    return Workload(name, sizes, "photographs, 8 glimpses each at 4 scales", devices=(device,))


WORKLOADS = (
    ram("ram60", 60, 12, 3),
    ram("ram28", 28, 8, 1),
    ram("ram100", 100, 12, 4),
    photo("photo", 8, "cpu"),
    photo("photo", 64, "cuda"),
    photo("photo-uint8", 8, "cpu", uint8=1),
    photo("photo-uint8", 64, "cuda", uint8=1),
)

# One glimpse of one image, however large that is: a line against its side stays level.
SIDES = tuple(2**k for k in range(5, 14))
SWEEPS = (Sweep("over-side", "side", {N: {"B": 1, "C": 1, "N": N, "g": 12, "S": 3, "G": 1} for N in SIDES}),)


def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    B, C, N, g, S, G = (workload.sizes[name] for name in ("B", "C", "N", "g", "S", "G"))
    if "uint8" in workload.sizes:
        image = torch.randint(0, 256, (B, C, N, N), generator=generator, dtype=torch.uint8).to(device)
    else:
        image = torch.rand(B, C, N, N, generator=generator).to(device, dtype).requires_grad_()
    loc = (torch.rand(B, G, 2, generator=generator) * 2 - 1).to(device)
    kwargs: dict[str, Any] = {"size": g, "scales": S, "dtype": dtype}
    return (image, loc), kwargs


def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Forward: reads the pixels of the widest windows, at most the image, and writes the cells. Backward: reads the
    cells' gradients and writes the image's."""
    B, C, N, g, S, G = (workload.sizes[name] for name in ("B", "C", "N", "g", "S", "G"))
    pixel = 1 if "uint8" in workload.sizes else dtype.itemsize
    seen = min(G * (g * 2 ** (S - 1)) ** 2, N * N)
    cells, taps = G * S * g * g, sum(G * (g * 2**s) ** 2 for s in range(S))
    moved = seen * pixel + cells * dtype.itemsize
    if backward:
        moved += (cells + N * N) * dtype.itemsize
    return B * C * moved, (2 if backward else 1) * B * C * 2 * taps


def sized(n: int) -> tuple[Any, ...]:
    return torch.randn(n, 2, n + 3, n + 1), torch.rand(n, 2) * 2 - 1


SPEC = OpSpec(
    name="glimpse",
    function=glimpse,
    backends=tuple(BACKENDS),
    samples=SAMPLES,
    workloads=WORKLOADS,
    inputs=inputs,
    cost=cost,
    sized=sized,
    sweeps=SWEEPS,
    wide=True,
)
