"""Batch normalisation over batch and time, with the statistics of the valid steps alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm(norm: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """norm of x (..., H) over all dimensions but the last. Where valid (..., 1) is False the result is unspecified."""
    if x.numel() == 0:
        return x
    takes_statistics = norm.training or not isinstance(norm, _BatchNorm) or norm.running_mean is None
    if valid is None or not takes_statistics:
        if norm.training and isinstance(norm, _BatchNorm):
            _check_count(x.numel() // x.shape[-1])
        y: Tensor = norm(x.flatten(0, -2))
        return y.reshape(x.shape)
    if isinstance(norm, nn.BatchNorm1d):
        return _masked(norm, x, valid)
    # Another kind, as SyncBatchNorm, keeps its own counsel: it is shown the valid steps and no others.
    index = valid.squeeze(-1)
    y = norm(x[index])
    return y.new_zeros(x.shape).index_put((index,), y)


def _check_count(count: int) -> None:
    if count <= 1:
        raise ValueError(f"IndRNN: norm needs more than 1 valid step in training, got {count}")


def _masked(norm: nn.BatchNorm1d, x: Tensor, valid: Tensor) -> Tensor:
    # F.batch_norm knows no mask, and with the valid steps taken out the host would wait for the device to count them.
    dims = tuple(range(x.dim() - 1))
    v = torch.where(valid, x, 0.0).to(torch.promote_types(x.dtype, torch.float32))
    count = valid.sum()
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_count(int(count))
    n = count.clamp(min=1).to(v.dtype)  # with integers and bools a number would have torch's default dtype
    mean = v.sum(dims) / n
    centred = torch.where(valid, v - mean, 0.0)
    var = centred.square().sum(dims) / n
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            momentum = norm.num_batches_tracked.to(v.dtype).reciprocal() if norm.momentum is None else norm.momentum
            # A batch without two valid steps has no variance; where it could not be refused, it leaves no trace.
            momentum = momentum * (count > 1).to(v.dtype)
            unbiased = var * (n / (n - 1).clamp(min=1))
            for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                running.copy_(running + momentum * (batch - running))
    y = centred * torch.rsqrt(var + norm.eps)
    return (y if norm.weight is None else y * norm.weight + norm.bias).to(x.dtype)
