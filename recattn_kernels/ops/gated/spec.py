"""What the specs of rnn, lstm and gru share: the samples that every cell has to pass, the workloads, and the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from recattn_kernels.ops import samples as random
from recattn_kernels.ops.gated.contract import KEPT
from recattn_kernels.ops.samples import Arguments, randn
from recattn_kernels.spec import Sample, Workload


class Samples:
    """The samples of one op: G gates, and, in the lstm, a state and options in pairs."""

    def __init__(self, gates: int, has_c: bool = False) -> None:
        self.gates, self.has_c = gates, has_c

    def sample(
        self, name: str, T: int, B: int, H: int, /, *, finite: bool = True, smooth: bool = True, **options: Any
    ) -> Sample:
        """A call on random numbers. `options` are the op's; those given as a function get (generator, T, B, H), and x
        and bias_hh the width of all gates for H. state=True gives an initial state; gain multiplies weight_hh."""

        def make(generator: Generator) -> Arguments:
            rest = dict(options)
            width = self.gates * H
            shape = (B, T, width) if rest.get("batch_first") else (T, B, width)
            x = rest.pop("x")(generator, T, B, width) if "x" in rest else randn(generator, *shape)
            scale = rest.pop("gain", 1.0) / math.sqrt(max(H, 1))
            weight_hh = (randn(generator, width, H, grad=False) * scale).requires_grad_()
            if rest.pop("state", False):
                rest["state" if self.has_c else "h0"] = self.pair(random.state)(generator, T, B, H)
            if "bias_hh" in rest:
                rest["bias_hh"] = rest["bias_hh"](generator, T, B, width)
            values = {key: value(generator, T, B, H) if callable(value) else value for key, value in rest.items()}
            return (x, weight_hh), values

        return Sample(name, make, finite, smooth)

    def pair(self, make: Callable[..., Tensor]) -> Callable[..., Any]:
        """A pair of what make returns where the op has an h and a c, else one."""
        if not self.has_c:
            return make
        return lambda *args: (make(*args), make(*args))

    def keep(self, batch_first: bool = False) -> dict[str, Any]:
        """Zoneout's options in training, with given masks."""

        def mask(generator: Generator, T: int, B: int, H: int) -> Tensor:
            return torch.rand((B, T, H) if batch_first else (T, B, H), generator=generator) < 0.3

        return {"zoneout": 0.3, "zoneout_mask": self.pair(mask), "training": True}

    def layer_norm(self, generator: Generator, T: int, B: int, H: int) -> tuple[Tensor, ...]:
        widths = [self.gates * H] * 2 + ([H] * 2 if self.has_c else [])
        return tuple(
            (randn(generator, n, grad=False) * 0.5 + (i % 2 == 0)).requires_grad_() for i, n in enumerate(widths)
        )

    def variant(self, prefix: str, names: Sequence[str], **options: Any) -> tuple[Sample, ...]:
        """Those of the samples that a variant of the cell has to pass again."""
        found = {s.name.removeprefix(prefix): s for s in self.all(prefix, **options)}
        return tuple(found[name] for name in names)

    def all(self, prefix: str = "", **variant: Any) -> Iterator[Sample]:

        def sample(name: str, *sizes: int, **options: Any) -> Sample:
            return self.sample(prefix + name, *sizes, **(variant | options))

        state: dict[str, Any] = {"state": True}
        usual: dict[str, Any] = {"bias_hh": random.bias, **state}
        interrupted: dict[str, Any] = {"reset": random.reset, "lengths": random.lengths, **usual}
        backwards = {"reverse": True, "batch_first": True, "reset": random.reset_batch_first}
        zoneout = {"zoneout": (0.2, 0.4) if self.has_c else 0.2}
        normed = {"layer_norm": self.layer_norm}

        yield sample("plain", 9, 2, 33)
        yield sample("wide", 5, 3, 130, **usual)
        yield sample("one_step", 1, 3, 5, **usual)
        yield sample("one_row", 7, 1, 65, **usual)
        yield sample("one_unit", 6, 4, 1, **usual)
        yield sample("one_element", 1, 1, 1, **usual)
        yield sample("long", 33, 2, 16, **state)
        yield sample("many_rows", 3, 70, 3, **usual)
        yield sample("reverse", 8, 3, 5, reverse=True, **usual)
        yield sample("batch_first", 8, 3, 33, batch_first=True, **usual)
        yield sample("reset", 12, 5, 7, reset=random.reset, **state)
        yield sample("lengths", 9, 6, 7, lengths=random.lengths, **usual)
        yield sample("lengths_list", 4, 3, 5, lengths=[4, 0, 2])
        yield sample("zoneout", 9, 3, 17, **self.keep(), **usual)
        yield sample("zoneout_evaluation", 9, 3, 17, **zoneout, **usual)
        yield sample("everything", 11, 6, 33, **interrupted, **self.keep())
        yield sample("everything_reverse", 11, 6, 33, **interrupted, **zoneout, reverse=True)
        yield sample("everything_batch_first", 11, 6, 33, **(interrupted | backwards), **self.keep(True), grad_clip=0.5,
                     smooth=False)  # fmt: skip
        yield sample("grad_clip", 12, 3, 9, grad_clip=0.2, smooth=False, **usual)
        yield sample(
            "expanded_x", 6, 4, 33, x=random.expanded, smooth=False, **state
        )  # gradcheck takes no shared memory
        yield sample("strided_rows", 6, 3, 20, x=random.strided_rows, **state)
        yield sample("strided_columns", 6, 3, 20, x=random.strided_columns, **state)
        yield sample("transposed_x", 6, 3, 20, x=random.transposed, **state)
        yield sample("frozen_x", 6, 3, 20, x=random.frozen, **usual)
        yield sample("no_steps", 0, 3, 5, **usual)
        yield sample("no_rows", 4, 0, 5, **usual, lengths=[])
        yield sample("no_units", 4, 3, 0, **usual)
        yield sample("nan", 7, 2, 5, x=random.planted(float("nan")), finite=False, **usual)
        yield sample("inf", 7, 2, 5, x=random.planted(float("inf")), finite=False, **usual)
        yield sample("nan_past_the_end", 7, 3, 5, x=random.past_the_end, lengths=[3, 0, 2], **usual)
        if variant.get("reset_after") is not False:
            yield sample("layer_norm", 7, 3, 33, **normed, **usual)
            yield sample("layer_norm_everything", 11, 6, 17, **normed, **interrupted, **self.keep())
            yield sample("layer_norm_reverse", 11, 4, 9, **normed, **(interrupted | backwards), **zoneout,
                         grad_clip=0.5, smooth=False)  # fmt: skip


def workloads() -> tuple[Workload, ...]:
    return (
        Workload("catch-256", {"T": 24, "B": 20, "H": 256}, "the agent that catches, Mnih et al. 2014, section 4.3"),
        Workload("seq", {"T": 128, "B": 32, "H": 256}, "a sequence of the usual size"),
        Workload("char-lm", {"T": 100, "B": 50, "H": 512}, "a character language model, truncated to 100 steps"),
        Workload("long", {"T": 1024, "B": 16, "H": 768}, "a long sequence, as of speech"),
        Workload("stream", {"T": 1, "B": 1, "H": 512}, "one step of one row, as when answering"),
        Workload("fleet", {"T": 1, "B": 4096, "H": 256}, "one step of many rows, as of simulated agents"),
    )


def inputs(gates: int) -> Callable[[Workload, torch.dtype, str, Generator], Arguments]:
    def make(workload: Workload, dtype: torch.dtype, device: str, generator: Generator) -> Arguments:
        T, B, H = (workload.sizes[name] for name in "TBH")
        x = torch.randn(T, B, gates * H, generator=generator)
        # As torch.nn initialises it.
        weight_hh = (torch.rand(gates * H, H, generator=generator) * 2 - 1) / math.sqrt(H)
        return (x.to(device, dtype).requires_grad_(), weight_hh.to(device, dtype).requires_grad_()), {}

    return make


def cost(cell: str, gates: int) -> Callable[[Workload, torch.dtype, bool], tuple[int, int]]:
    """Forward: reads x and weight_hh, writes output. Backward: also what is kept is written and read, grad_output and
    output are read, and the gradients of x and weight_hh written. One product forward, two backward."""

    def bytes_and_flops(workload: Workload, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        T, B, H = (workload.sizes[name] for name in "TBH")
        n, weights = T * B * H, gates * H * H
        moved = (gates + 1) * n + weights
        if backward:
            moved += 2 * KEPT[cell] * n + (gates + 2) * n + 2 * weights
        return moved * dtype.itemsize, (3 if backward else 1) * 2 * n * gates * H

    return bytes_and_flops
