"""The two forms in which a layer holds a batch of sequences, and the way from each to the ops, which take padded ones.

A packed batch has no padding, and a layer leaves it so; where an op has to have it padded, it pads it. Its rows stay
longest first, as PackedSequence keeps them: only states, masks and resets have to be permuted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recattn_kernels import checks
from recattn_kernels.ops import sequence


class Padded:
    """(T, B, ...), or (B, T, ...) under batch_first. valid (T, B, 1) or (B, T, 1) marks the steps within a length."""

    def __init__(self, x: Tensor, batch_first: bool, lengths: Tensor | None) -> None:
        self.batch_first = batch_first
        self.lengths = lengths
        self.valid: Tensor | None = None
        if lengths is not None:
            t = torch.arange(x.shape[1 if batch_first else 0], device=x.device)
            rows = lengths.to(x.device)
            self.valid = (t < rows[:, None] if batch_first else t[:, None] < rows).unsqueeze(-1)

    def pad(self, x: Tensor) -> Tensor:
        return x

    def pack(self, x: Tensor) -> Tensor:
        return x

    def over_time(self, mask: Tensor) -> Tensor:
        """(B, C), one value a row, in a shape that multiplies a batch of sequences."""
        return mask.unsqueeze(1 if self.batch_first else 0)

    def zero_padding(self, x: Tensor) -> Tensor:
        return x if self.valid is None else torch.where(self.valid, x, 0.0)


class Packed:
    """(N, ...), the valid steps alone: batch_sizes[t] rows for each step t, longest sequence first."""

    batch_first = False  # of the padded form
    valid = None

    def __init__(self, batch_sizes: Tensor) -> None:
        self.batch_sizes = batch_sizes
        self.T, self.B = len(batch_sizes), int(batch_sizes[0])
        # Rows of one length: packed and padded are the same memory.
        self.even = int(batch_sizes[-1]) == self.B
        self.lengths = None if self.even else sequence.lengths_of(batch_sizes)

    def pad(self, x: Tensor) -> Tensor:
        if self.even:
            return x.view(self.T, self.B, *x.shape[1:])
        return sequence.pad(x, self.batch_sizes)

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.even else sequence.pack(x, self.batch_sizes)

    def over_time(self, mask: Tensor) -> Tensor:
        """(B, C), one value a row, in a shape that multiplies a batch of sequences."""
        return self.pack(mask.expand(self.T, *mask.shape))

    def zero_padding(self, x: Tensor) -> Tensor:
        return x


def permute(x: Tensor | None, indices: Tensor | None, dim: int) -> Tensor | None:
    """x with what lies along dim taken in the order of indices; without either, x."""
    return x if x is None or indices is None else x.index_select(dim, indices)


def check_reset(layer: str, reset: Tensor, T: int, B: int | None, batch_first: bool, input: Tensor) -> None:
    """reset as a layer takes it, padded; B is None for unbatched input."""
    symbols = "(T,)" if B is None else "(B, T)" if batch_first else "(T, B)"
    rows = () if B is None else (B,)
    checks.tensor(layer, "reset", reset)
    checks.shape(layer, "reset", reset, symbols, (*rows, T) if batch_first else (T, *rows))
    checks.dtype(layer, "reset", reset, (torch.bool,))
    checks.device(layer, "reset", reset, "input", input)
