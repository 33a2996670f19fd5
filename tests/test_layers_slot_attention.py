"""SlotAttention against the iterations written out here, and as a module."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recattn_kernels import BackendUnavailableError, SlotAttention, use_backend
from recattn_kernels.layers import slot_attention_inputs
from recattn_kernels.layers.slot_attention_inputs import absorbs

B, N, K, D, D_IN = 3, 40, 4, 8, 6
pytestmark = pytest.mark.usefixtures("absorbing")


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
        k, v = (linear(x, name).view(len(x), h, layer.dim // h) for name in ("project_k", "project_v"))
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
        absorbed.append(absorbs(layer, inputs, K))
        outputs = layer(inputs, slots, **masks, return_attn=True)
        torch.testing.assert_close((*outputs, *grads(outputs, wanted)), expected)
        torch.testing.assert_close(layer(inputs, slots, **masks), outputs[0])
    if name in ("bias", "joint", "default", "residual", "fixed-point", "bi-level"):
        assert absorbed[1]
    if name in ("denominator", "heads"):
        assert absorbed == [False, False]


def test_absorbs_where_it_takes_fewer_operations() -> None:
    def of(layer: SlotAttention, N: int) -> bool:
        return absorbs(layer, torch.empty(1, N, layer.input_dim), layer.num_slots)

    layer = SlotAttention(7, 64)
    assert of(layer, 16384) and of(layer, 1024)
    assert not of(layer, 16)  # fewer inputs than slots over the iterations
    assert not of(layer, 0)
    assert of(SlotAttention(7, 64, input_dim=384), 1024)
    assert not of(SlotAttention(64, 64, input_dim=384), 1024)
    assert not of(SlotAttention(7, 64, input_dim=768), 1024)  # more features than the kernels take
    assert of(SlotAttention(4, 64, heads=2, head_softmax="joint"), 1024)
    assert not of(SlotAttention(64, 64, heads=4, head_softmax="joint"), 1024)
    assert not of(SlotAttention(7, 64, eps=0.0), 1024)


def test_absorbs_where_that_pays_for_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture absorbing
    layer = SlotAttention(7, 64)
    assert [absorbs(layer, torch.empty(samples, 256, 64), 7) for samples in (1, 16)] == [False, True]


@pytest.mark.parametrize("change", ["hook", "parametrised", "another norm", "frozen norm"])
def test_follows_what_is_put_in_place_of_its_parts(change: str) -> None:
    layer = make()
    inputs, slots = randn(B, N, D), randn(B, K, D)
    before = layer(inputs, slots)
    assert absorbs(layer, inputs, K)
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
    assert not absorbs(layer, inputs, K)
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
