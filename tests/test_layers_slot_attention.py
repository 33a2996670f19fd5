"""SlotAttention against the iterations written out here, its presets and converters, and as a citizen of torch.nn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recattn_kernels import BackendUnavailableError, SlotAttention, backends, use_backend
from recattn_kernels.layers import slot_attention_inputs
from recattn_kernels.layers.normalise import normalise
from recattn_kernels.layers.slot_attention_inputs import absorbs

B, N, K, D, D_IN = 3, 40, 4, 8, 6


def make(*args: Any, **options: Any) -> SlotAttention:
    """A layer in float64, whose parameters are all random."""
    layer = SlotAttention(*(args or (K, D)), dtype=torch.float64, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.5)
    return layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def some(*shape: int) -> Tensor:
    """A mask with about two thirds True, the first row all, the last none."""
    mask = torch.rand(*shape) < 0.67
    mask[0], mask[-1] = True, False
    return mask


def plain(
    layer: SlotAttention, inputs: Tensor, slots: Tensor, slot_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, head by head and sample by sample; masked slots and inputs are taken out."""
    p, h = dict(layer.named_parameters()), layer.heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.ln_eps).sqrt()
        return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def gru(x: Tensor, state: Tensor) -> Tensor:
        gates = x @ p["gru.weight_ih"].T + p["gru.bias_ih"], state @ p["gru.weight_hh"].T + p["gru.bias_hh"]
        (r, z, n), (r_h, z_h, n_h) = (g.chunk(3, -1) for g in gates)
        z = torch.sigmoid(z + z_h)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * state

    def sample(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = norm(x, "norm_inputs")
        k, v = (linear(x, name).view(len(x), h, D // h) for name in ("project_k", "project_v"))
        initial = state
        for i in range(layer.iters):
            if layer.grad_mode != "full" and i == layer.iters - 1:
                state = state.detach()
                if layer.grad_mode == "bi-level":
                    state = state + initial - initial.detach()
            q = linear(norm(state, "norm_slots"), "project_q").view(len(state), h, -1)
            logits = torch.einsum("khd,nhd->hkn", q, k) / (layer.temperature * math.sqrt(layer.dim / h))
            joint = layer.head_softmax == "joint"
            attn = logits.exp() / logits.exp().sum((0, 1) if joint else 1, keepdim=True)
            if layer.eps_mode == "add":
                weights = (attn + layer.eps) / (attn + layer.eps).sum(-1, keepdim=True)
            else:
                weights = attn / (attn.sum(-1, keepdim=True) + layer.eps)
            updates = torch.einsum("hkn,nhd->khd", weights, v).flatten(1)
            state = state + updates if layer.update == "residual" else gru(updates, state)
            hidden = linear(norm(state, "norm_mlp"), "mlp.0").relu()
            state = state + linear(hidden, "mlp.2")
        return state, attn

    result = torch.zeros_like(slots)
    attns = inputs.new_zeros(len(inputs), h, slots.shape[1], inputs.shape[1])
    for b in range(len(inputs)):
        rows = torch.arange(slots.shape[1]) if slot_mask is None else slot_mask[b].nonzero().flatten()
        columns = torch.arange(inputs.shape[1]) if input_mask is None else input_mask[b].nonzero().flatten()
        if len(rows):
            state, attn = sample(inputs[b, columns], slots[b, rows])
            result = result.index_put((torch.tensor(b), rows), state)
            attns = attns.index_put((torch.tensor(b), torch.arange(h)[:, None, None], rows[:, None], columns), attn)
    return result, attns.squeeze(1) if h == 1 else attns


def grads(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).mul(7).sin().view(t.shape) for t in outputs]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"bias": True, "input_dim": D_IN, "temperature": 0.5, "eps": 1e-2, "ln_eps": 1e-3},
    "denominator": {"bias": True, "eps_mode": "denominator", "eps": 1e-2},
    "heads": {"heads": 4, "bias": True, "mlp_dim": 5},
    "joint": {"heads": 2, "bias": True, "head_softmax": "joint", "input_dim": D_IN, "eps": 1e-2},
    "residual": {"update": "residual", "iters": 2},
    "fixed-point": {"grad_mode": "fixed-point"},
    "bi-level": {"grad_mode": "bi-level", "bias": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_plain_iterations(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(**OPTIONS[name])
    inputs, slots = randn(B, N, layer.input_dim), randn(B, K, D)
    masks = {"slot_mask": some(B, K), "input_mask": some(B, N).flip(0)} if masked else {}
    wanted = [inputs, slots, *layer.parameters()]
    expected = plain(layer, inputs, slots, **masks)
    expected = *expected, *grads(expected, wanted)
    absorbed = []
    for cost in (1e9, 0.0):  # keys and values, or none, in so far as they can be absorbed
        monkeypatch.setattr(slot_attention_inputs, "ATTENTION_COST", cost)
        absorbed.append(absorbs(layer, N, K))
        outputs = layer(inputs, slots, **masks, return_attn=True)
        torch.testing.assert_close((*outputs, *grads(outputs, wanted)), expected)
        torch.testing.assert_close(layer(inputs, slots, **masks), outputs[0])
    if name in ("bias", "joint", "default", "residual", "fixed-point", "bi-level"):
        assert absorbed[1]
    if name in ("denominator", "heads"):
        assert absorbed == [False, False]


def test_absorbs_where_it_takes_fewer_operations() -> None:
    layer = SlotAttention(7, 64)
    assert absorbs(layer, 16384, 7) and absorbs(layer, 1024, 7)
    assert not absorbs(layer, 16, 7)  # fewer inputs than slots over the iterations
    assert not absorbs(layer, 0, 7)
    assert absorbs(SlotAttention(7, 64, input_dim=384), 1024, 7)
    assert not absorbs(SlotAttention(64, 64, input_dim=384), 1024, 64)
    assert not absorbs(SlotAttention(7, 64, input_dim=768), 1024, 7)  # more features than the kernels take
    assert absorbs(SlotAttention(4, 64, heads=2, head_softmax="joint"), 1024, 4)
    assert not absorbs(SlotAttention(64, 64, heads=4, head_softmax="joint"), 1024, 64)
    assert not absorbs(SlotAttention(7, 64, eps=0.0), 1024, 7)


@pytest.mark.parametrize("change", ["hook", "parametrised", "another norm", "frozen norm"])
def test_follows_what_is_put_in_place_of_its_parts(change: str) -> None:
    layer = make()
    inputs, slots = randn(B, N, D), randn(B, K, D)
    before = layer(inputs, slots)
    assert absorbs(layer, N, K)
    if change == "hook":
        layer.project_v.register_forward_hook(lambda module, args, output: output + 1)
    elif change == "parametrised":
        nn.utils.parametrizations.weight_norm(layer.project_k)
        with torch.no_grad():
            layer.project_k.parametrizations.weight.original0.mul_(2)
    elif change == "another norm":
        layer.norm_inputs = nn.Identity()
    else:
        layer.norm_inputs = nn.LayerNorm(D, elementwise_affine=False)
    assert not absorbs(layer, N, K)
    assert not torch.allclose(layer(inputs, slots), before)


@pytest.mark.parametrize("eps_mode", ["add", "denominator"])
def test_what_is_masked_may_hold_anything(eps_mode: str) -> None:
    layer = make(bias=True, eps_mode=eps_mode)
    slot_mask, input_mask = some(B, K), some(B, N).flip(0)
    results = []
    for rubbish in (0.0, math.nan, math.inf):
        inputs = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0)).double()
        slots = torch.randn(B, K, D, generator=torch.Generator().manual_seed(1)).double()
        inputs[~input_mask], slots[~slot_mask] = rubbish, rubbish
        inputs.requires_grad_(), slots.requires_grad_()
        outputs = layer(inputs, slots, slot_mask=slot_mask, input_mask=input_mask, return_attn=True)
        results.append((*outputs, *grads(outputs, [inputs, slots, *layer.parameters()])))
        assert (outputs[0][~slot_mask] == 0).all()
        assert all(t.isfinite().all() for t in results[-1])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_slots_that_nothing_wins_and_equal_inputs_are_finite() -> None:
    layer = make(eps_mode="denominator", temperature=1e-3)
    outputs, attn = layer(torch.ones(B, N, D).double(), randn(B, K, D), return_attn=True)
    assert (attn.sum(-1) < 1e-300).any() and outputs.isfinite().all()
    assert layer(torch.zeros(B, N, D).double()).isfinite().all()


def test_sizes_of_nothing() -> None:
    layer = make()
    assert layer(randn(0, N, D)).shape == (0, K, D)
    slots = randn(B, K, D)
    inputs = randn(B, 0, D)
    expected = plain(layer, randn(B, 1, D), slots, input_mask=torch.zeros(B, 1, dtype=torch.bool))
    torch.testing.assert_close(layer(inputs, slots), expected[0])


def test_number_of_slots_is_that_of_the_call() -> None:
    layer = make()
    inputs = randn(B, N, D)
    assert layer(inputs).shape == (B, K, D)
    slots, attn = layer(inputs, num_slots=9, return_attn=True)
    assert slots.shape == (B, 9, D) and attn.shape == (B, 9, N)
    torch.testing.assert_close(attn.sum(1), torch.ones(B, N).double())
    assert layer(inputs, randn(B, 2, D)).shape == (B, 2, D)
    _, attn = make(heads=2)(inputs, return_attn=True)
    assert attn.shape == (B, 2, K, N)


def test_slots_start_from_a_normal_distribution_that_a_generator_repeats() -> None:
    layer = make(1000, D)
    inputs = randn(B, N, D)

    def run(seed: int) -> Tensor:
        result: Tensor = layer(inputs, generator=torch.Generator().manual_seed(seed))
        return result

    assert run(0).equal(run(0)) and not run(0).equal(run(1)) and not layer(inputs).equal(layer(inputs))
    seen = []
    layer.norm_slots.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(inputs)
    slots, mu, sigma = seen[0].flatten(0, 1), layer.slots_mu[0, 0], layer.slots_log_sigma[0, 0].exp()
    torch.testing.assert_close(slots.mean(0), mu, rtol=0, atol=0.1 * float(sigma.detach().max()))
    torch.testing.assert_close(slots.std(0), sigma, rtol=0.1, atol=0)
    noise = torch.randn(B, 1000, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(run(3), layer(inputs, mu + sigma * noise))


def test_learned_slots() -> None:
    layer = make(init="learned")
    inputs = randn(B, N, D)
    assert layer.slots_mu.shape == (1, K, D) and layer.slots_log_sigma is None
    torch.testing.assert_close(layer(inputs), layer(inputs, layer.slots_mu.expand(B, -1, -1)))
    torch.testing.assert_close(layer(inputs, num_slots=2), layer(inputs, layer.slots_mu[:, :2].expand(B, -1, -1)))
    with pytest.raises(
        ValueError, match=r"^SlotAttention: num_slots must be at most 4, as that many are learned, got 5"
    ):
        layer(inputs, num_slots=5)


def test_gradients_of_the_initial_slots() -> None:
    inputs, slots = randn(B, N, D), randn(B, K, D)
    found = {}
    for mode in ("full", "fixed-point", "bi-level"):
        layer = make(grad_mode=mode)
        (found[mode],) = grads((layer(inputs, slots),), [slots])
        gaussian = grads((layer(inputs),), [layer.slots_mu, layer.slots_log_sigma])
        assert all((g != 0).any() == (mode != "fixed-point") for g in gaussian)
    assert (found["full"] != 0).any() and (found["bi-level"] != 0).any() and (found["fixed-point"] == 0).all()


@pytest.mark.parametrize("mode", ["fixed-point", "bi-level"])
def test_iterations_before_the_last_keep_nothing(mode: str) -> None:
    kept = []
    for iters in (1, 6):
        layer = SlotAttention(K, D, iters=iters, grad_mode=mode)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(B, N, D))
        kept.append(sum(saved))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 2])
def test_sixteen_bits_are_as_good_as_their_roundings(dtype: torch.dtype, heads: int) -> None:
    layer = SlotAttention(K, 32, heads=heads)
    layer.mlp[1] = nn.Tanh()  # without a kink that a rounding may cross
    inputs, slots = torch.randn(B, 200, 32), torch.randn(B, K, 32)
    results = []
    for module, to in ((layer, torch.float32), (copy.deepcopy(layer).to(dtype), dtype)):
        outputs = module(inputs.to(to), slots.to(to))
        found = torch.autograd.grad(outputs.float().square().sum(), module.parameters(), materialize_grads=True)
        assert all(t.dtype == to for t in (outputs, *found))
        results.append((outputs.float(), torch.cat([g.float().flatten() for g in found])))
    for (exact, rounded), most in zip(zip(*results, strict=True), (2, 16), strict=True):
        assert (rounded - exact).norm() <= most * torch.finfo(dtype).eps * exact.norm()


def test_float16_of_many_inputs_and_large_ones_is_finite() -> None:
    layer = SlotAttention(K, 16, dtype=torch.float16)
    inputs = (1000 * torch.randn(B, 5000, 16)).half().requires_grad_()
    outputs, attn = layer(inputs, return_attn=True)
    (outputs.float().mean() + attn.float().mean()).backward()
    assert outputs.isfinite().all() and inputs.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"heads": 2}])
def test_autocast(options: dict[str, Any]) -> None:
    layer = SlotAttention(K, 32, **options)
    inputs, slots = torch.randn(B, 200, 32), torch.randn(B, K, 32)
    expected = layer(inputs, slots)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs, slots)
        assert layer(inputs.bfloat16(), slots.bfloat16()).isfinite().all()
    assert (outputs.float() - expected).norm() < 0.03 * expected.norm()
    outputs.float().sum().backward()
    assert layer.project_k.weight.grad.dtype == torch.float32


def test_compiles_into_one_graph(fresh_compiler: None) -> None:
    layer = make()
    inputs, slots, input_mask = randn(B, N, D), randn(B, K, D), some(B, N)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wanted = [inputs, slots, *layer.parameters()]
    outputs = layer(inputs, slots, input_mask=input_mask)
    found = compiled(inputs, slots, input_mask=input_mask)
    torch.testing.assert_close((found, *grads((found,), wanted)), (outputs, *grads((outputs,), wanted)))


# Presets and weights


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


# A citizen of torch.nn


def test_parameters() -> None:
    layer = SlotAttention(K, D, input_dim=D_IN, mlp_dim=10, bias=True)
    expected = {"slots_mu": (1, 1, D), "slots_log_sigma": (1, 1, D)}
    linears = {"project_q": (D, D), "project_k": (D, D_IN), "project_v": (D, D_IN), "mlp.0": (10, D), "mlp.2": (D, 10)}
    norms = {"norm_inputs": (D_IN,), "norm_slots": (D,), "norm_mlp": (D,)}
    for name, shape in {**linears, **norms}.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    expected |= {f"gru.{n}": s for n, s in nn.GRUCell(D, D).state_dict().items() for s in (tuple(s.shape),)}
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == expected
    without = {name for name, _ in SlotAttention(K, D, init="learned", update="residual").named_parameters()}
    assert not any(
        name.startswith(("gru", "slots_log_sigma")) or ("project" in name and "bias" in name) for name in without
    )
    layer.gru.load_state_dict(nn.GRUCell(D, D).state_dict())


def test_initialisation_of_sixteen_bits() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        other = SlotAttention(K, 32, dtype=dtype)
        assert all(p.dtype == dtype and p.isfinite().all() for p in other.parameters())


def test_backend() -> None:
    layer, inputs = SlotAttention(K, D, backend="vendor"), torch.randn(B, N, D)
    with pytest.raises(BackendUnavailableError, match=r"^slot_attention: backend 'vendor' cannot run this call"):
        layer(inputs)
    slots = torch.randn(B, K, D)
    layer = SlotAttention(K, D)
    with use_backend("reference"):
        expected = layer(inputs, slots)
    torch.testing.assert_close(layer(inputs, slots), expected)
    with use_backend("vendor"), pytest.raises(BackendUnavailableError):
        layer(inputs, slots)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"dim": 2.0}, TypeError, "dim must be an int, got 2.0"),
        ({"iters": 0}, ValueError, "iters must be at least 1, got 0"),
        ({"heads": 3}, ValueError, "heads must divide dim = 8, got 3"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"ln_eps": math.inf}, ValueError, "ln_eps must be finite, got inf"),
        ({"eps_mode": "mean"}, ValueError, "eps_mode must be one of add, denominator, got 'mean'"),
        ({"head_softmax": "heads"}, ValueError, "head_softmax must be one of slots, joint, got 'heads'"),
        ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
        ({"init": "zeros"}, ValueError, "init must be one of gaussian, learned, got 'zeros'"),
        ({"update": "lstm"}, ValueError, "update must be one of gru, residual, got 'lstm'"),
        ({"grad_mode": "implicit"}, ValueError, "grad_mode must be one of full, fixed-point, bi-level, got 'implicit'"),
        ({"backend": "metal"}, ValueError, "backend must be one of"),
    ],
)
def test_refuses_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"num_slots": K, "dim": D, **options}
    with pytest.raises(error, match=f"^SlotAttention: {match}"):
        SlotAttention(arguments.pop("num_slots"), arguments.pop("dim"), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs must be a Tensor, got list"),
        ({"inputs": torch.zeros(N, D)}, ValueError, r"inputs must be \(B, N, input_dim\), got \(40, 8\)"),
        ({"inputs": torch.zeros(B, N, 5)}, ValueError, r"inputs must be \(B, N, input_dim\) = \(3, 40, 8\), got"),
        ({"inputs": torch.zeros(B, N, D).double()}, TypeError, "inputs must be float32, got float64"),
        ({"slots": torch.zeros(B, K, 5)}, ValueError, r"slots must be \(B, K, dim\) = \(3, 4, 8\), got \(3, 4, 5\)"),
        ({"slots": torch.zeros(2, K, D)}, ValueError, r"slots must be \(B, K, dim\) = \(3, 4, 8\), got \(2, 4, 8\)"),
        ({"slots": torch.zeros(B, K, D).half()}, TypeError, "slots must be float32, got float16"),
        (
            {"slots": torch.zeros(B, K, D), "num_slots": 5},
            ValueError,
            r"slots must be \(B, K, dim\) = \(3, 5, 8\), got",
        ),
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"slot_mask": torch.ones(B, K)}, TypeError, "slot_mask must be bool, got float32"),
        ({"slot_mask": torch.ones(B, 5).bool()}, ValueError, r"slot_mask must be \(B, K\) = \(3, 4\), got \(3, 5\)"),
        ({"input_mask": torch.ones(N).bool()}, ValueError, r"input_mask must be \(B, N\) = \(3, 40\), got \(40,\)"),
        ({"return_attn": 1}, TypeError, "return_attn must be a bool, got 1"),
    ],
)
def test_refuses_calls(call: dict[str, Any], error: type[Exception], match: str) -> None:
    layer, arguments = SlotAttention(K, D), {"inputs": torch.zeros(B, N, D), **call}
    with pytest.raises(error, match=f"^SlotAttention: {match}"):
        layer(arguments.pop("inputs"), **arguments)


# What the layer computes with on a CPU


@pytest.mark.parametrize("shape", [(3, 40, 64), (700, 65), (2, 1), (5, 130), (0, 8)])
def test_normalise(shape: tuple[int, ...]) -> None:
    extension = backends.extension("_cpu")
    if isinstance(extension, str):
        pytest.skip(extension)
    x, dy = (3 * torch.randn(shape) + 100).requires_grad_(), torch.randn(shape)

    def results(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y = function(x)
        return y.detach(), *torch.autograd.grad(y, x, dy)

    def torchs(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape[-1:])

    exact = results(torchs, x.detach().double().requires_grad_(), dy.double())
    theirs = results(torchs, x, dy)
    before = extension.capability()
    try:
        for name in extension.capabilities():
            extension.set_capability(name)
            apart = torch.stack([x, x], -1).detach()[..., 0].requires_grad_()  # its elements are not side by side
            for given, flow in ((x, dy), (apart, torch.stack([dy, dy], -1)[..., 0])):
                ours = results(lambda t: normalise(t, 1e-5), given, flow)
                for found, plain, true in zip(ours, theirs, exact, strict=True):
                    assert found.shape == true.shape
                    if true.numel() > 0:
                        bound = 8 * torch.finfo(torch.float32).eps * true.abs().max()
                        assert (found - true).abs().max() <= 2 * (plain - true).abs().max() + bound
    finally:
        extension.set_capability(before)


def test_normalise_has_second_derivatives_and_keeps_nan() -> None:
    x = torch.randn(4, 20).requires_grad_()
    weight = torch.randn(4, 20)
    results = []
    for function in (lambda: normalise(x, 1e-5), lambda: F.layer_norm(x, (20,))):
        (grad,) = torch.autograd.grad((function() * weight).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(results[0], results[1])
    x = x.detach()
    x[1, 3], x[2, 0] = math.nan, math.inf
    assert normalise(x, 1e-5).isnan().all(1).tolist() == [False, True, True, False]
