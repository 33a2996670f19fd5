"""SlotAttention's presets, and weights of other implementations against these, written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_layers_slot_attention import D_IN, B, D, K, N, randn

from recattn_kernels import SlotAttention


def test_presets() -> None:
    official = SlotAttention.preset("official", 7, 64)
    assert (official.norm_inputs.eps, official.mlp_dim, official.eps_mode, official.bias) == (1e-3, 128, "add", False)
    savi = SlotAttention.preset("savi", 11, 128)
    assert (savi.norm_slots.eps, savi.mlp_dim, savi.eps_mode, savi.iters) == (1e-6, 256, "denominator", 1)
    for dim in (64, 192):
        assert SlotAttention.preset("lucidrains", 5, dim).mlp_dim == max(dim, 128)
    assert SlotAttention.preset("lucidrains", 5, 64).project_q.bias is not None
    slate = SlotAttention.preset("slate", 6, 192, heads=4, iters=7, dtype=torch.float64)
    assert (slate.head_softmax, slate.mlp_dim, slate.heads, slate.iters) == ("joint", 192, 4, 7)
    assert slate.slots_mu.dtype == torch.float64
    with pytest.raises(ValueError, match=r"^SlotAttention: name must be one of official, savi, lucidrains, slate, got"):
        SlotAttention.preset("tensorflow", 7, 64)


def np_norm(x: Any, gamma: Any, beta: Any, eps: float) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * gamma + beta


def np_softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def np_sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def tensorflow_arrays(random: np.random.Generator, width: int = D_IN) -> dict[str, Any]:
    shapes = {
        "slots_mu": (1, 1, D), "slots_log_sigma": (1, 1, D), "project_q/kernel": (D, D), "project_k/kernel": (width, D),
        "project_v/kernel": (width, D), "gru/kernel": (D, 3 * D), "gru/recurrent_kernel": (D, 3 * D),
        "gru/bias": (2, 3 * D), "mlp/0/kernel": (D, 10), "mlp/0/bias": (10,), "mlp/1/kernel": (10, D),
        "mlp/1/bias": (D,), "norm_inputs/gamma": (width,), "norm_inputs/beta": (width,), "norm_slots/gamma": (D,),
        "norm_slots/beta": (D,), "norm_mlp/gamma": (D,), "norm_mlp/beta": (D,),
    }  # fmt: skip
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def tensorflow_forward(w: dict[str, Any], inputs: Any, slots: Any, iters: int) -> Any:
    """Keras's layers: kernels (in, out), gates in the order update, reset, candidate, the state kept where z is 1."""

    def norm(x: Any, name: str) -> Any:
        return np_norm(x, w[f"{name}/gamma"], w[f"{name}/beta"], 1e-3)

    x = norm(inputs, "norm_inputs")
    k, v = x @ w["project_k/kernel"], x @ w["project_v/kernel"]
    for _ in range(iters):
        q = norm(slots, "norm_slots") @ w["project_q/kernel"] * D**-0.5
        attn = np_softmax(k @ q.swapaxes(1, 2), -1) + 1e-8  # (B, N, K)
        updates = (attn / attn.sum(-2, keepdims=True)).swapaxes(1, 2) @ v
        x_z, x_r, x_h = np.split(updates @ w["gru/kernel"] + w["gru/bias"][0], 3, -1)
        s_z, s_r, s_h = np.split(slots @ w["gru/recurrent_kernel"] + w["gru/bias"][1], 3, -1)
        z, r = np_sigmoid(x_z + s_z), np_sigmoid(x_r + s_r)
        slots = z * slots + (1 - z) * np.tanh(x_h + r * s_h)
        hidden = np.maximum(norm(slots, "norm_mlp") @ w["mlp/0/kernel"] + w["mlp/0/bias"], 0)
        slots = slots + hidden @ w["mlp/1/kernel"] + w["mlp/1/bias"]
    return slots


TENSORFLOW_NAMES = {
    "checkpoint": lambda name: (
        "network/layer_with_weights-0/slot_attention/"
        + name.replace("mlp/0", "mlp/layer_with_weights-0").replace("mlp/1", "mlp/layer_with_weights-1")
        + "/.ATTRIBUTES/VARIABLE_VALUE"
    ),
    "variables": lambda name: (
        "slot_attention/"
        + name.replace("project_", "").replace("gru/", "gru_cell_3/").replace("norm_inputs", "layer_normalization_9")
        .replace("norm_slots", "layer_normalization_10").replace("norm_mlp", "layer_normalization_11")
        .replace("mlp/0", "mlp/dense").replace("mlp/1", "mlp/dense_1")
        + ":0"
    ),
    "dots": lambda name: name.replace("/", "."),
}  # fmt: skip


@pytest.mark.parametrize("naming", TENSORFLOW_NAMES)
def test_weights_of_the_authors_tensorflow_code(naming: str) -> None:
    random = np.random.default_rng(0)
    arrays = tensorflow_arrays(random)
    inputs, slots = random.normal(size=(B, N, D_IN)), random.normal(size=(B, K, D))
    renamed = {TENSORFLOW_NAMES[naming](name): array for name, array in arrays.items()}
    if naming != "dots":  # of the model around it, and of the optimizer
        renamed["network/layer_with_weights-0/mlp/layer_with_weights-0/kernel"] = np.zeros((2, 2))
        path = "network/slot_attention/slots_mu/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"
        renamed[path] = np.zeros((1, 1, D))
    layer = SlotAttention.from_tensorflow(renamed, num_slots=5, iters=2)
    assert (layer.num_slots, layer.iters, layer.input_dim, layer.mlp_dim, layer.norm_mlp.eps) == (5, 2, D_IN, 10, 1e-3)
    expected = tensorflow_forward(arrays, inputs, slots, 2)
    torch.testing.assert_close(layer(torch.from_numpy(inputs), torch.from_numpy(slots)), torch.from_numpy(expected))
    torch.testing.assert_close(layer.slots_mu.detach(), torch.from_numpy(arrays["slots_mu"]))
    torch.testing.assert_close(layer.slots_log_sigma.detach(), torch.from_numpy(arrays["slots_log_sigma"]))


def test_what_is_not_tensorflows_weights_is_refused() -> None:
    arrays = tensorflow_arrays(np.random.default_rng(0))
    for change, match in (
        ({"gru/bias": np.zeros(3 * D)}, r"gru/bias must be \(2, 3D\) = \(2, 24\), of a GRU with reset_after=True"),
        ({"decoder/kernel": np.zeros((1, 1))}, r"arrays must be of a slot attention, which has no decoder/kernel"),
        ({"mlp/2/kernel": np.zeros((D, D))}, r"arrays must hold 2 layers of mlp, got 3"),
    ):
        with pytest.raises(ValueError, match="^SlotAttention: " + match):
            SlotAttention.from_tensorflow({**arrays, **change})
    del arrays["project_k/kernel"]
    with pytest.raises(ValueError, match=r"^SlotAttention: arrays must hold what becomes project_k\.weight"):
        SlotAttention.from_tensorflow(arrays)


def lucidrains_state(random: np.random.Generator, inner: int | None = None) -> dict[str, Any]:
    E = inner or D
    shapes: dict[str, tuple[int, ...]] = {"slots_mu": (1, 1, D), "slots_logsigma": (1, 1, D)}
    linears = {"to_q": (E, D), "to_k": (E, D), "to_v": (E, D), "mlp.0": (16, D), "mlp.2": (D, 16)}
    if inner is not None:
        linears["combine_heads"] = (D, E)
    linears |= {name: (D,) for name in ("norm_input", "norm_slots", "norm_pre_ff")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"gru.weight_{x}": (3 * D, D) for x in ("ih", "hh")} | {f"gru.bias_{x}": (3 * D,) for x in ("ih", "hh")}
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def lucidrains_forward(w: dict[str, Any], inputs: Any, slots: Any, heads: int | None) -> Any:
    """heads None: its SlotAttention; else MultiHeadSlotAttention."""

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        return np_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads or 1, -1).swapaxes(1, 2)

    x = norm(inputs, "norm_input")
    k, v = split(linear(x, "to_k")), split(linear(x, "to_v"))
    for _ in range(3):
        attn = np_softmax(split(linear(norm(slots, "norm_slots"), "to_q")) @ k.swapaxes(2, 3) * D**-0.5, -2)
        if heads is None:
            attn = (attn + 1e-8) / (attn + 1e-8).sum(-1, keepdims=True)
        else:
            attn = attn / np.maximum(attn.sum(-1, keepdims=True), 1e-8)
        updates = (attn @ v).swapaxes(1, 2).reshape(*slots.shape[:2], -1)
        if heads is not None:
            updates = linear(updates, "combine_heads")
        gates = updates @ w["gru.weight_ih"].T + w["gru.bias_ih"], slots @ w["gru.weight_hh"].T + w["gru.bias_hh"]
        (x_r, x_z, x_n), (s_r, s_z, s_n) = (np.split(g, 3, -1) for g in gates)
        r, z = np_sigmoid(x_r + s_r), np_sigmoid(x_z + s_z)
        slots = (1 - z) * np.tanh(x_n + r * s_n) + z * slots
        slots = slots + linear(np.maximum(linear(norm(slots, "norm_pre_ff"), "mlp.0"), 0), "mlp.2")
    return slots


@pytest.mark.parametrize("heads", [None, 4])
def test_weights_of_lucidrains(heads: int | None) -> None:
    random = np.random.default_rng(0)
    arrays = lucidrains_state(random, None if heads is None else D)
    inputs, slots = random.normal(size=(B, N, D)), random.normal(size=(B, K, D))
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    layer = SlotAttention.from_lucidrains(state, num_slots=3, heads=heads or 1)
    assert (layer.num_slots, layer.mlp_dim, layer.heads) == (3, 16, heads or 1)
    expected = torch.from_numpy(lucidrains_forward(arrays, inputs, slots, heads))
    torch.testing.assert_close(layer(torch.from_numpy(inputs), torch.from_numpy(slots)), expected)
    torch.testing.assert_close(layer.slots_mu.detach(), state["slots_mu"])


def test_weights_of_the_first_versions_of_lucidrains() -> None:
    state = {name: torch.from_numpy(array) for name, array in lucidrains_state(np.random.default_rng(0)).items()}
    new = {
        "norm_pre_ff": "mlp.fn.norm", "mlp.0": "mlp.fn.fn.0", "mlp.2": "mlp.fn.fn.2",
        **{f"gru.{x}": f"gru.{x}_l0" for x in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    }  # fmt: skip
    old = {}
    for name, tensor in state.items():
        for prefix, other in new.items():
            name = name.replace(prefix, other) if name.startswith(prefix) and "fn" not in name else name
        old[name] = tensor
    for name in ("to_q", "to_k", "to_v"):
        state[f"{name}.bias"].zero_()
        del old[f"{name}.bias"]
    old["slots_sigma"] = -old.pop("slots_logsigma").exp()
    inputs, slots = randn(B, N, D), randn(B, K, D)
    found, expected = SlotAttention.from_lucidrains(old), SlotAttention.from_lucidrains(state)
    torch.testing.assert_close(found(inputs, slots), expected(inputs, slots))
    torch.testing.assert_close(found.slots_log_sigma, expected.slots_log_sigma)


def test_what_is_not_lucidrains_weights_is_refused() -> None:
    random = np.random.default_rng(0)
    state = {name: torch.from_numpy(array) for name, array in lucidrains_state(random).items()}
    wide = {name: torch.from_numpy(array) for name, array in lucidrains_state(random, 2 * D).items()}
    missing = {name: tensor for name, tensor in state.items() if name != "to_v.weight"}
    for weights, heads, match in (
        ({**state, "head.weight": state["slots_mu"]}, 1, r"state_dict must be of the package .* no head\.weight"),
        (missing, 1, r"state_dict must hold what becomes project_v\.weight"),
        (state, 2, r"heads must be 1 without combine_heads, got 2"),
        (wide, 2, r"heads must divide dim = 8 among them .* got heads=2 with heads \* dim_head = 16"),
    ):
        with pytest.raises(ValueError, match="^SlotAttention: " + match):
            SlotAttention.from_lucidrains(weights, heads=heads)
