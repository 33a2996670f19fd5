"""SlotAttention as well-known implementations have it: their settings, and their weights under our names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import checks

NAME = "SlotAttention"
Sizes = dict[str, Any]  # arguments of the constructor that the weights determine
State = dict[str, Tensor]


def preset(name: str, dim: int) -> dict[str, Any]:
    """The options of an implementation that differ from the constructor's own; dim: of a slot."""
    presets: dict[str, dict[str, Any]] = {
        "official": {"ln_eps": 1e-3},  # Keras's default
        "savi": {"iters": 1, "mlp_dim": 256, "eps_mode": "denominator", "ln_eps": 1e-6},  # Flax's default
        "lucidrains": {"bias": True, "mlp_dim": max(dim, 128)},
        "slate": {"mlp_dim": dim, "head_softmax": "joint"},
    }
    checks.choice(NAME, "name", name, presets)
    return presets[name]


# TensorFlow

# Where a variable of the authors' code goes, by the last words of its name: in a checkpoint the attributes' names, in
# model.variables those that the layers were given, or Keras gave them.
_TENSORFLOW = {
    r"slots_mu": "slots_mu",
    r"slots_log_sigma": "slots_log_sigma",
    r"norm_(inputs|slots|mlp) gamma": r"norm_\1.weight",
    r"norm_(inputs|slots|mlp) beta": r"norm_\1.bias",
    r"(?:project_)?([qkv]) kernel": r"project_\1.weight",
    r"(?:project_)?([qkv]) bias": r"project_\1.bias",
    r"(?:gru|gru_cell\w*) kernel": "gru.weight_ih",
    r"(?:gru|gru_cell\w*) recurrent_kernel": "gru.weight_hh",
    r"(?:gru|gru_cell\w*) bias": "gru.bias",
    r"mlp (?:\w+-|dense_|layers )?(\d+) kernel": r"mlp \1.weight",
    r"mlp (?:\w+-|dense_|layers )?(\d+) bias": r"mlp \1.bias",
    r"mlp dense kernel": "mlp -1.weight",  # before dense_1
    r"mlp dense bias": "mlp -1.bias",
    r"layer_normalization gamma": "norm -1.weight",
    r"layer_normalization beta": "norm -1.bias",
    r"layer_normalization_(\d+) gamma": r"norm \1.weight",
    r"layer_normalization_(\d+) beta": r"norm \1.bias",
}


def from_tensorflow(arrays: Mapping[str, Any]) -> tuple[Sizes, State]:
    """The weights of the TensorFlow code of Locatello et al. (google-research/slot_attention).

    Args:
        arrays: {name: array}, of a checkpoint or of model.variables: norm_inputs/gamma, project_q/kernel, gru/bias,
            mlp/layer_with_weights-0/kernel, slots_mu and so on, with or without the path before it ("network/.../
            slot_attention/") and what TensorFlow puts after it (":0", "/.ATTRIBUTES/VARIABLE_VALUE"). In a whole
            model's those of its slot_attention are taken, and the optimizer's left.

    Returns: what SlotAttention's constructor must be told, and its state_dict. A dense kernel is transposed there; the
    gates of the GRU are put from TensorFlow's order, update, reset, candidate, into torch's, reset, update, candidate;
    its bias (2, 3 D) is split. ln_eps is not among the weights: it is 1e-3, as the preset "official" has it.

    Raises ValueError for arrays of another shape, one that is missing, or one that is not of a slot attention.
    """
    found: State = {}
    for name, array in _own(arrays).items():
        words = _words(name)
        for pattern, ours in _TENSORFLOW.items():
            if (match := re.search(rf"(?:^| ){pattern}$", words)) is not None:
                found[match.expand(ours)] = torch.as_tensor(array)
                break
        else:
            raise ValueError(f"{NAME}: arrays must be of a slot attention, which has no {name}")
    _number(found, "mlp", ("mlp.0", "mlp.2"))
    _number(found, "norm", ("norm_inputs", "norm_slots", "norm_mlp"))
    needed = [
        "slots_mu", "slots_log_sigma", "gru.weight_ih", "gru.weight_hh", "gru.bias",
        *(f"project_{x}.weight" for x in "qkv"),
        *(f"{m}.{p}" for m in ("norm_inputs", "norm_slots", "norm_mlp", "mlp.0", "mlp.2") for p in ("weight", "bias")),
    ]  # fmt: skip
    _require(found, needed, "arrays")
    state = {name: t.t() if t.dim() == 2 and "weight" in name else t for name, t in found.items()}
    D, D_in = state["project_k.weight"].shape
    bias = state.pop("gru.bias")
    if bias.shape != (2, 3 * D):
        raise ValueError(
            f"{NAME}: gru/bias must be (2, 3D) = {(2, 3 * D)}, of a GRU with reset_after=True, got {tuple(bias.shape)}"
        )
    state["gru.bias_ih"], state["gru.bias_hh"] = bias
    for name in [name for name in state if name.startswith("gru.")]:
        update, reset, candidate = state[name].chunk(3)
        state[name] = torch.cat((reset, update, candidate))
    for name in ("slots_mu", "slots_log_sigma"):
        state[name] = state[name].reshape(1, 1, D)
    sizes = {"dim": D, "input_dim": D_in, "mlp_dim": state["mlp.0.weight"].shape[0], "bias": "project_q.bias" in state}
    return sizes, _contiguous(state)


def _own(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the slot attention, where arrays are of a whole model."""
    kept = {name: a for name, a in arrays.items() if ".OPTIMIZER_SLOT" not in name}
    inside = {name: a for name, a in kept.items() if "slot_attention" in re.split(r"[/.]", name)}
    return inside or kept


def _words(name: str) -> str:
    """The parts of a variable's name, spaces between them."""
    name = re.sub(r"(/\.ATTRIBUTES/VARIABLE_VALUE|:\d+)$", "", name)
    return " ".join(re.split(r"[/.]", name))


def _number(found: State, group: str, ours: tuple[str, ...]) -> None:
    """Renames "group n.what" to ours: Keras numbers its layers in the order in which they are made."""
    numbers = sorted({int(name.split()[1].split(".")[0]) for name in found if name.startswith(group + " ")})
    if numbers and len(numbers) != len(ours):
        raise ValueError(f"{NAME}: arrays must hold {len(ours)} layers of {group}, got {len(numbers)}")
    for n, name in zip(numbers, ours, strict=False):
        for what in ("weight", "bias"):
            if (tensor := found.pop(f"{group} {n}.{what}", None)) is not None:
                found[f"{name}.{what}"] = tensor


# lucidrains

_LUCIDRAINS = {
    "norm_input": "norm_inputs", "norm_slots": "norm_slots", "norm_pre_ff": "norm_mlp", "mlp.fn.norm": "norm_mlp",
    "to_q": "project_q", "to_k": "project_k", "to_v": "project_v", "gru": "gru", "combine_heads": "combine_heads",
    "mlp.0": "mlp.0", "mlp.2": "mlp.2", "fc1": "mlp.0", "fc2": "mlp.2", "mlp.fn.fn.0": "mlp.0", "mlp.fn.fn.2": "mlp.2",
    "slots_mu": "slots_mu", "slots_logsigma": "slots_log_sigma", "slots_sigma": "slots_sigma",
}  # fmt: skip


def from_lucidrains(state_dict: Mapping[str, Tensor], heads: int = 1) -> tuple[Sizes, State]:
    """The weights of the package slot-attention: of its SlotAttention, and of MultiHeadSlotAttention.

    Args:
        state_dict: the module's own.
        heads: of MultiHeadSlotAttention, which must divide its slots' features among them (heads * dim_head = dim). Its
            combine_heads is linear, and so is what the GRU does with it: it goes into gru.weight_ih and gru.bias_ih.

    Returns: what SlotAttention's constructor must be told, and its state_dict. The package scales by 1 / sqrt(dim)
    whatever the heads, which is a temperature of sqrt(heads) here. With heads it divides by the sum or eps, whichever
    is more, which is eps_mode "denominator" with an eps of 0 unless a slot wins less than eps. Its first versions draw
    the noise with slots_sigma as the standard deviation.

    Raises ValueError for a name that is not of the package, one that is missing, or heads that do not fit.
    """
    state: State = {}
    for name, tensor in state_dict.items():
        module, _, what = name.rpartition(".")
        if name in _LUCIDRAINS:
            state[_LUCIDRAINS[name]] = tensor.detach()
        elif module in _LUCIDRAINS:
            state[f"{_LUCIDRAINS[module]}.{what.removesuffix('_l0')}"] = tensor.detach()
        else:
            raise ValueError(f"{NAME}: state_dict must be of the package slot-attention, which has no {name}")
    if "slots_sigma" in state:
        state["slots_log_sigma"] = state.pop("slots_sigma").abs().log()
    modules = ("norm_inputs", "norm_slots", "norm_mlp", "mlp.0", "mlp.2")
    needed = [f"{m}.{p}" for m in modules for p in ("weight", "bias")]
    needed += [f"gru.{p}_{s}" for p in ("weight", "bias") for s in ("ih", "hh")]
    _require(state, ["slots_mu", "slots_log_sigma", *(f"project_{x}.weight" for x in "qkv"), *needed], "state_dict")
    inner, D = state["project_q.weight"].shape
    sizes: Sizes = {
        "dim": D, "mlp_dim": state["mlp.0.weight"].shape[0], "bias": "project_q.bias" in state, "heads": heads,
    }  # fmt: skip
    if (combine := state.pop("combine_heads.weight", None)) is None:
        if heads != 1:
            raise ValueError(f"{NAME}: heads must be 1 without combine_heads, got {heads}")
    else:
        if inner != D or D % heads != 0:
            raise ValueError(
                f"{NAME}: heads must divide dim = {D} among them (heads * dim_head = dim), got heads={heads} with"
                f" heads * dim_head = {inner}"
            )
        weight_ih = state["gru.weight_ih"]
        state["gru.bias_ih"] = state["gru.bias_ih"] + weight_ih @ state.pop("combine_heads.bias")
        state["gru.weight_ih"] = weight_ih @ combine
        sizes |= {"temperature": heads**0.5, "eps_mode": "denominator", "eps": 0.0}
    return sizes, _contiguous(state)


def _require(found: Mapping[str, Tensor], names: Iterable[str], where: str) -> None:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{NAME}: {where} must hold what becomes {', '.join(missing)}")


def _contiguous(state: State) -> State:
    return {name: tensor.contiguous() for name, tensor in state.items()}
