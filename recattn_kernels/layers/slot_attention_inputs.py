"""What the iterations of SlotAttention read of the inputs: keys and values, or the normalised inputs themselves.

With x = gamma * n + beta, n the inputs normalised without scale and shift, and [W_k, b_k], [W_v, b_v] the projections:

    q . k = q . (W_k x + b_k) = (gamma * W_k^T q) . n + q . (W_k beta + b_k)
    sum over inputs of W v    = W_v (gamma * sum W n) + (W_v beta + b_v) sum W

so that one product with W_k of each slot takes the place of one of each input: n is then both keys and values, and is
all that the kernel reads. sum W is 1 in eps_mode "add", and 0 for a slot or a sample that is masked.

The projection of the queries goes into the same product where the slots of all iterations are more rows than it has:
q = W_q s + b_q, of slots s after their norm, and W_k^T q = (W_k^T W_q) s + W_k^T b_q. What all slots of an input gain
alike, as q . W_k beta from b_q, the softmax over them takes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn_kernels.layers.autocast import autocasts
from recattn_kernels.layers.normalise import normalise
from recattn_kernels.layers.projection import project
from recattn_kernels.ops.slot_attention.repeated import repeated

if TYPE_CHECKING:
    from recattn_kernels.layers.slot_attention import SlotAttention


class Attention(NamedTuple):
    """What every iteration attends to: attend(s, whether A is wanted) gives updates (B, K, D), A or None.

    s (B, K, D): the slots after their norm, of which the queries are made.

    k, v: what it reads, v None where k itself is the values. absorbed: W_k and W_v with their shifts, where they are
    applied to the queries and the updates.
    """

    attend: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
    k: Tensor
    v: Tensor | None
    absorbed: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    scale: float


# What the fused kernels take: beyond it only the reference would run.
MOST_SLOTS, MOST_FEATURES = 128, 512
# What a multiply-add of the attention takes, in those of a matrix product.
ATTENTION_COST = 2.5
# What the calls that an absorbed iteration has more of take on a CPU: two products, and what goes with their shifts.
# Measured on one with AMX from 2 x 64 inputs and slots of 64 features to 4 x 1225 and of 256: from 3e6 to 7e6.
ABSORBED_CALLS = 5e6


def attention_over(
    layer: SlotAttention,
    inputs: Tensor,
    K: int,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    times: int,
    backend: str,
) -> Attention:
    """The attention of every iteration over inputs (B, N, input_dim): `times` with a gradient and A not wanted.

    backend: the one that is asked for.
    """
    options: dict[str, Any] = {
        "scale": 1 / (layer.temperature * math.sqrt(layer.dim / layer.heads)), "eps": layer.eps,
        "eps_mode": layer.eps_mode, "input_mask": input_mask, "backend": backend,
    }  # fmt: skip
    if absorbs(layer, inputs, K):
        return _absorbed(layer, inputs, K, slot_mask, input_mask, options, times)
    return _projected(layer, inputs, slot_mask, options, times)


def absorbs(layer: SlotAttention, inputs: Tensor, K: int) -> bool:
    """Whether the projections go to the queries and the updates: where that is exact, and takes less time.

    Exact: in eps_mode "add", where the weights of a slot add up to 1. With heads that compete by themselves there
    would be keys for every head; those that compete jointly are as good as slots of one head.
    """
    B, N, _ = inputs.shape
    calls = ABSORBED_CALLS if inputs.device.type == "cpu" else 0
    if torch.compiler.is_compiling():  # a rule on sizes that change would compile anew for each, or not export
        B, N, K, calls = 1, 1024, layer.num_slots, 0
    rows = layer.heads * K
    if layer.eps_mode != "add" or layer.eps == 0 or (layer.heads > 1 and layer.head_softmax != "joint"):
        return False
    if rows > MOST_SLOTS or layer.input_dim > MOST_FEATURES:
        return False
    if not (is_plain(layer.norm_inputs, nn.LayerNorm) and layer.norm_inputs.elementwise_affine):
        return False
    if not (is_plain(layer.project_k, nn.Linear) and is_plain(layer.project_v, nn.Linear)):
        return False
    # Multiply-adds of a sample. A head reads D / heads features of its keys, but all of the inputs.
    D, D_in, iters = layer.dim, layer.input_dim, layer.iters
    absorbed = iters * (2 * K * D * D_in + ATTENTION_COST * 2 * rows * N * D_in)
    projected = 2 * N * D * D_in + iters * ATTENTION_COST * 2 * K * N * D
    return B * (projected - absorbed) > iters * calls


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it is its formula and nothing else, so that its parameters may be used in another order."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def _projected(
    layer: SlotAttention, inputs: Tensor, slot_mask: Tensor | None, options: dict[str, Any], times: int
) -> Attention:
    x, backend = layer.norm_inputs(inputs), options["backend"]
    k, v = (_by_head(linear(module, x, backend), layer.heads) for module in (layer.project_k, layer.project_v))

    once = repeated(k, v, times, slot_mask=slot_mask, head_softmax=layer.head_softmax, **options)

    def attend(s: Tensor, return_attn: bool) -> tuple[Tensor, Tensor | None]:
        q = linear(layer.project_q, s, backend)
        updates, attn = once(_by_head(q, layer.heads), None, return_attn)
        return updates if layer.heads == 1 else updates.transpose(1, 2).flatten(2), attn

    return Attention(attend, k, v, (None, None, None, None), options["scale"])


def _by_head(x: Tensor, heads: int) -> Tensor:
    """x (B, N, D) as (B, heads, N, D / heads), or as it is where there is one head."""
    return x if heads == 1 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def linear(module: nn.Module, x: Tensor, backend: str) -> Tensor:
    """module(x), by our own product where module is a torch.nn.Linear and nothing more."""
    if isinstance(module, nn.Linear) and is_plain(module, nn.Linear):
        return project(x, module.weight, module.bias, backend)
    result: Tensor = module(x)
    return result


def _absorbed(
    layer: SlotAttention,
    inputs: Tensor,
    K: int,
    slot_mask: Tensor | None,
    input_mask: Tensor | None,
    options: dict[str, Any],
    times: int,
) -> Attention:
    heads, norm, backend = layer.heads, layer.norm_inputs, options["backend"]
    x = normalise(inputs, norm.eps, backend)
    if autocasts(x) and x.dtype == torch.float32:  # layer_norm returns float32 there, which the projections would cast
        x = x.to(torch.get_autocast_dtype(x.device.type))
    (key, key_shift), (value, value_shift) = (_folded(m, norm) for m in (layer.project_k, layer.project_v))
    options = {**options, "slot_mask": slot_mask if slot_mask is None else slot_mask.repeat(1, heads)}
    # Where the weights of a slot add up to 1, not 0.
    summed = slot_mask
    if input_mask is not None:
        some = input_mask.any(-1, keepdim=True)
        summed = some if summed is None else summed & some
    shift = value_shift if summed is None else value_shift * summed.unsqueeze(-1)
    once = repeated(x, None, times, **options)
    queries = _queries(layer, key, key_shift, inputs.shape[0] * K, backend)

    def attend(s: Tensor, return_attn: bool) -> tuple[Tensor, Tensor | None]:
        rows, bias = queries(s)
        mean, attn = once(rows, options["scale"] * bias, return_attn)  # (B, heads * K, input_dim)
        if heads == 1:
            updates = project(mean, value, None, backend)
        else:
            mean = mean.unflatten(1, (heads, K))
            updates = torch.einsum("bhke,hde->bkhd", mean, value.unflatten(0, (heads, -1))).flatten(2)
            attn = None if attn is None else attn.unflatten(1, (heads, K))
        return updates + shift, attn

    return Attention(attend, x, None, (key, key_shift, value, value_shift), options["scale"])


def _queries(
    layer: SlotAttention, key: Tensor, key_shift: Tensor, slots: int, backend: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """s -> W_k^T q (B, heads * K, input_dim), and what the logits gain by key_shift, before their scale."""
    heads, project_q = layer.heads, layer.project_q
    if heads == 1 and is_plain(project_q, nn.Linear) and _folds(layer, key, slots):
        weight = project(key.t(), project_q.weight.t(), None, backend)  # (input_dim, D)
        shift = torch.mv(project_q.weight.t(), key_shift)
        constant = None if project_q.bias is None else torch.mv(key.t(), project_q.bias)
        return lambda s: (project(s, weight, constant, backend), torch.matmul(s, shift))

    def queries(s: Tensor) -> tuple[Tensor, Tensor]:
        q = linear(project_q, s, backend)
        if heads == 1:
            return project(q, key.t(), None, backend), torch.matmul(q, key_shift)
        by_head = q.unflatten(-1, (heads, -1))
        rows = torch.einsum("bkhd,hde->bhke", by_head, key.unflatten(0, (heads, -1))).flatten(1, 2)
        return rows, torch.einsum("bkhd,hd->bhk", by_head, key_shift.unflatten(0, (heads, -1))).flatten(1, 2)

    return queries


def _folds(layer: SlotAttention, key: Tensor, slots: int) -> bool:
    """Whether W_k^T W_q takes fewer multiply-adds than W_q s in every iteration, of so many slots in all samples."""
    # In 16 bits it would be rounded. On a GPU iterations that are one launch do not need it.
    if torch.compiler.is_compiling() or key.dtype not in (torch.float32, torch.float64) or autocasts(key):
        return False
    return key.device.type == "cpu" and layer.input_dim < layer.iters * slots


def _folded(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """What linear does to the inputs as they are before norm's scale and shift: weight and bias."""
    shift = torch.zeros_like(linear.weight[:, 0]) if norm.bias is None else torch.mv(linear.weight, norm.bias)
    return linear.weight * norm.weight, shift if linear.bias is None else shift + linear.bias
