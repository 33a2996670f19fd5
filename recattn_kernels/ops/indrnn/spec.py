"""IndRNN for the tests and the benchmarks: samples, workloads, sweeps, and the least that a call costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.ops.indrnn.api import indrnn
from recattn_kernels.ops.indrnn.contract import ACTIVATIONS, BACKENDS
from recattn_kernels.ops.samples import (
    Arguments,
    bias,
    expanded,
    frozen,
    lengths,
    past_the_end,
    planted,
    randn,
    reset,
    reset_batch_first,
    state,
    strided_columns,
    strided_rows,
    transposed,
    zeros,
)
from recattn_kernels.spec import OpSpec, Sample, Sweep, Workload


def sample(name: str, T: int, B: int, H: int, /, *, finite: bool = True, smooth: bool = True, **options: Any) -> Sample:
    """A call on random numbers. `options` are indrnn's; those given as a function get (generator, T, B, H)."""

    def make(generator: Generator) -> Arguments:
        options_ = dict(options)
        batch_first = options.get("batch_first", False)
        x = options_.pop("x", None)
        x = x(generator, T, B, H) if x else randn(generator, *((B, T, H) if batch_first else (T, B, H)))
        u = (torch.rand(H, generator=generator, dtype=torch.float64) * 2.2 - 1.1).requires_grad_()
        u = options_.pop("u")(u) if "u" in options_ else u
        values = {key: value(generator, T, B, H) if callable(value) else value for key, value in options_.items()}
        return (x, u), values

    refused_by = ("cpp",) if options.get("algorithm") == "scan" else ()
    return Sample(name, make, finite, smooth, refused_by)


def steep(u: Tensor) -> Tensor:
    """A product of a chunk's weights is infinite in float32; a bounded activation keeps the sequence finite."""
    return (u.detach().sign() * 6e4).requires_grad_()


EVERYTHING: dict[str, Any] = {"h0": state, "bias": bias, "reset": reset, "lengths": lengths}

SAMPLES = (
    *(sample(f"{act}", 9, 3, 65, activation=act, h0=state, bias=bias) for act in ACTIVATIONS),
    sample("plain", 17, 2, 130),
    sample("no_bias", 5, 2, 8, h0=state, activation="tanh"),
    sample("one_step", 1, 3, 5, h0=state, activation="tanh"),
    sample("one_row", 7, 1, 65, activation="sigmoid", bias=bias),
    sample("one_column", 6, 4, 1, h0=state, activation="tanh"),
    # Not tanh: alone and nearly saturated, its 16-bit derivative, read off the rounded output, misses the rule.
    sample("one_element", 1, 1, 1, h0=state, bias=bias, activation="leaky_relu"),
    sample("long", 33, 2, 16, h0=state),
    sample("many_rows", 4, 70, 3, h0=state, activation="tanh"),
    sample("reverse", 8, 3, 5, reverse=True, h0=state, bias=bias, activation="tanh"),
    sample("batch_first", 8, 3, 65, batch_first=True, h0=state, bias=bias, activation="tanh"),
    sample("reset", 12, 5, 7, reset=reset, h0=state, activation="tanh"),
    sample("lengths", 9, 6, 7, lengths=lengths, h0=state, bias=bias, activation="tanh"),
    sample("lengths_list", 4, 3, 5, lengths=[4, 0, 2], activation="tanh"),
    sample("everything", 13, 6, 33, **EVERYTHING, activation="tanh"),
    sample("everything_reverse", 13, 6, 33, **EVERYTHING, activation="tanh", reverse=True),
    sample(
        "everything_batch_first", 13, 6, 33, **(EVERYTHING | {"reset": reset_batch_first}), activation="leaky_relu",
        negative_slope=0.2, reverse=True, batch_first=True, grad_clip=0.7, smooth=False,
    ),
    sample("everything_relu", 13, 6, 33, **EVERYTHING, grad_clip=0.7, smooth=False),
    sample("grad_clip", 12, 3, 9, grad_clip=0.5, h0=state, activation="tanh", smooth=False),
    sample("grad_clip_tight", 12, 3, 9, grad_clip=1e-3, bias=bias, smooth=False),
    sample("saturated", 9, 3, 20, activation="relu6", x=lambda *a: (randn(*a, grad=False) * 6).requires_grad_()),
    sample("zeros", 6, 2, 5, x=zeros, smooth=False),
    sample("expanded_x", 6, 4, 65, x=expanded, activation="tanh", smooth=False),  # gradcheck takes no shared memory
    sample("strided_rows", 6, 3, 20, x=strided_rows, activation="tanh"),
    sample("strided_columns", 6, 3, 20, x=strided_columns, activation="tanh"),
    sample("transposed_x", 6, 3, 20, x=transposed, activation="tanh"),
    sample("frozen_x", 6, 3, 20, x=frozen, h0=state, bias=bias, activation="tanh"),
    sample("frozen_weight", 6, 3, 20, u=lambda u: u.detach(), h0=state, bias=bias, activation="tanh"),
    sample("no_steps", 0, 3, 5, h0=state, bias=bias),
    sample("no_rows", 4, 0, 5, h0=state, bias=bias, lengths=[]),
    sample("no_columns", 4, 3, 0, h0=state, bias=bias),
    *(sample(f"nan_{act}", 7, 2, 5, activation=act, x=planted(float("nan")), finite=False) for act in ACTIVATIONS),
    sample("inf", 7, 2, 5, x=planted(float("inf")), finite=False),
    sample("minus_inf", 7, 2, 5, activation="identity", x=planted(-float("inf")), finite=False),
    sample("inf_tanh", 7, 2, 5, activation="tanh", x=planted(-float("inf"))),
    sample("nan_past_the_end", 7, 3, 5, activation="tanh", x=past_the_end, lengths=[3, 0, 2]),
    sample("nan_reset", 7, 2, 5, x=planted(float("nan")), finite=False,
           reset=lambda g, T, B, H: (torch.arange(T) == T // 2 + 1)[:, None].expand(T, B)),
    *(sample(f"scan_{act}", 33, 2, 10, algorithm="scan", activation=act, h0=state, bias=bias) for act in ACTIVATIONS),
    sample("scan_one_step", 1, 2, 3, algorithm="scan", h0=state, smooth=False),
    sample("scan_everything", 33, 3, 5, **EVERYTHING, algorithm="scan"),
    sample("scan_everything_reverse", 33, 3, 5, **EVERYTHING, algorithm="scan", reverse=True, activation="hardtanh",
           grad_clip=0.7, smooth=False),
    sample("scan_batch_first", 20, 3, 5, **(EVERYTHING | {"reset": reset_batch_first}), algorithm="scan",
           batch_first=True, activation="identity", grad_clip=0.7, smooth=False),
    sample("scan_zero_weight", 20, 2, 5, algorithm="scan", u=lambda u: (u * 0).detach().requires_grad_(), h0=state),
    sample("scan_steep", 66, 1, 6, algorithm="scan", activation="relu6", u=steep, smooth=False),
    sample("scan_nan", 33, 2, 5, algorithm="scan", x=planted(float("nan")), finite=False),
    sample("scan_inf", 33, 2, 5, algorithm="scan", activation="identity", x=planted(float("inf")), finite=False),
    sample("scan_nan_reset", 33, 2, 5, algorithm="scan", x=planted(float("nan")), finite=False,
           reset=lambda g, T, B, H: (torch.arange(T) == T // 2 + 1)[:, None].expand(T, B)),
    sample("scan_no_steps", 0, 3, 5, algorithm="scan", h0=state, bias=bias),
)  # fmt: skip

WORKLOADS = (
    Workload("seqmnist-784", {"T": 784, "B": 32, "H": 128}, "sequential MNIST, Li et al. 2018, section 5.2"),
    Workload("adding-5000", {"T": 5000, "B": 50, "H": 128}, "the adding problem, Li et al. 2018, section 5.1"),
    Workload("ptb-char", {"T": 50, "B": 128, "H": 2000}, "Penn Treebank characters, Li et al. 2018, section 5.3.1"),
    Workload("wide", {"T": 2500, "B": 64, "H": 4096}, "fills a large GPU", devices=("cuda",)),
)


def inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    T, B, H = (workload.sizes[name] for name in "TBH")
    x = torch.randn(T, B, H, generator=generator).to(device, dtype).requires_grad_()
    # The paper's bound for ReLU over T steps, |u| <= 2^(1/T), keeps every value finite.
    u = (torch.rand(H, generator=generator) * 2 ** (1 / T)).to(device, dtype).requires_grad_()
    return (x, u), {}


def cost(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Forward: reads x, writes output. Backward: reads grad_output and output, writes grad_x."""
    n = workload.sizes["T"] * workload.sizes["B"] * workload.sizes["H"]
    return (5 if backward else 2) * n * dtype.itemsize, (3 + (6 if backward else 0)) * n


# The largest weight of a sweep. Nearer to 1, one of a few columns remembers far longer than the others, and its
# rounding alone decides each check: in a dozen sizes that goes wrong by chance.
SWEEP_WEIGHT = 0.9


def sweep_inputs(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
    T, B, H = (workload.sizes[name] for name in "TBH")
    # No state near relu's kink: of millions one is so near that the order of roundings decides its whole gradient.
    x = (torch.randn(T, B, H, generator=generator).abs() + 0.1).to(device, dtype).requires_grad_()
    u = (torch.rand(H, generator=generator) * SWEEP_WEIGHT).to(device, dtype).requires_grad_()
    return (x, u), {}


STEPS = tuple(2**k for k in range(6, 17))  # 64 to 65,536
COLUMNS = tuple(4**k for k in range(3, 11))  # 64 to 1,048,576

# float32 tensors of at most 268 MB on a CPU, so that the peers, which hold ten of them or so, fit in 8 GB; a GPU's may
# take 1.1 GB. 512 columns leave most of a GPU idle: there a scan over time has something to gain.
SWEEPS = (
    Sweep("over-T", "T", {T: {"T": T, "B": 4, "H": 128} for T in STEPS}, inputs=sweep_inputs),
    Sweep("over-BH", "B*H", {n: {"T": 64, "B": n // 64, "H": 64} for n in COLUMNS}, ("cpu",), sweep_inputs),
    Sweep("over-BH", "B*H", {n: {"T": 256, "B": n // 64, "H": 64} for n in COLUMNS}, ("cuda",), sweep_inputs),
)


SPEC = OpSpec(
    name="indrnn",
    function=indrnn,
    backends=tuple(BACKENDS),
    samples=SAMPLES,
    workloads=WORKLOADS,
    inputs=inputs,
    cost=cost,
    sweeps=SWEEPS,
    variants=({"algorithm": "sequential"}, {"algorithm": "scan"}),
)
