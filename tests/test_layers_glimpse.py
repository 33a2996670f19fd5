"""GlimpseSensor, GlimpseNetwork and RecurrentAttention against their equations, written out with torch alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import recattn_kernels as rk
from recattn_kernels import GlimpseNetwork, GlimpseSensor, RecurrentAttention, reinforce_loss
from recattn_kernels.layers.recurrent_attention import RecurrentAttentionOutput

CLASSES, B, T = 5, 4, 3
EVERYTHING: dict[str, Any] = {
    "core": "lstm", "glimpse": "multiplicative", "learn_std": True, "stop": True, "scales": 2, "channels": 2,
}  # fmt: skip


def make_model(**options: Any) -> RecurrentAttention:
    options = {"glimpse_size": 4, "num_glimpses": T, "hidden_size": 8, "dtype": torch.float64, **options}
    model = RecurrentAttention(CLASSES, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # far from 0, so that each location is another one
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def make_image(channels: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(B, channels, 11, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_sensor() -> None:
    image, loc = make_image(2), torch.tensor([[0.1, -0.3], [0.0, 0.0], [-0.9, 2.0], [0.5, 0.5]], dtype=torch.float64)
    for options in ({}, {"padding": "border", "zoom": 1.5, "mode": "bilinear", "coords": "yx", "dtype": torch.float32}):
        sensor = GlimpseSensor((3, 2), 2, 1.5, **options)
        expected = rk.glimpse(image, loc, (3, 2), scales=2, scale_factor=1.5, **options)
        torch.testing.assert_close(sensor(image, loc), expected, rtol=0, atol=0)
    zoom = torch.tensor([1.0, 2.0, 0.5, 1.2], dtype=torch.float64)
    several = GlimpseSensor(3)(image, loc.unsqueeze(1).expand(-1, 2, -1), zoom)
    torch.testing.assert_close(several, rk.glimpse(image, loc, 3, zoom=zoom).unsqueeze(1).expand(-1, 2, -1, -1, -1, -1))
    with pytest.raises(rk.BackendUnavailableError, match=r"^glimpse: "):
        GlimpseSensor(8, backend="cuda")(image, loc)


def test_glimpse_network() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(B, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    loc = torch.randn(B, 2, generator=generator)
    for form in ("additive", "multiplicative"):
        network = GlimpseNetwork(3, (4, 5), 2, 7, features=6, glimpse=form, dtype=torch.float64)
        for p in network.parameters():
            nn.init.normal_(p, generator=generator)
        what = network.what(network.glimpse_in(seen.reshape(B, -1)).clamp(min=0))
        where = network.where(network.location_in(loc.double()).clamp(min=0))
        expected = (what + where).clamp(min=0) if form == "additive" else what.clamp(min=0) * where.clamp(min=0)
        assert expected.shape == (B, 7) and expected.count_nonzero() > 3
        torch.testing.assert_close(network(seen, loc), expected)
    with pytest.raises(ValueError, match=re.escape("GlimpseNetwork: glimpse must be (B, S, C, gh, gw) = (4, 2, 3, 4,")):
        network(seen[:, :1], loc)
    with pytest.raises(ValueError, match=re.escape("GlimpseNetwork: loc must be (B, 2) = (4, 2), got (4, 3)")):
        network(seen, torch.zeros(B, 3))
    with pytest.raises(ValueError, match=r"GlimpseNetwork: glimpse must be on cpu as what\.weight is, got meta"):
        network(seen.to("meta"), loc)
    with pytest.raises(TypeError, match="GlimpseNetwork: glimpse must be float64, got float32"):
        network(seen.float(), loc)


def restate(model: RecurrentAttention, image: Tensor, locations: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """What one sample of the model gives, from where it looked (B, T, 2) and how often (B,), row by row."""
    H, results = model.hidden_size, {"logits": [], "log_probs": [], "baselines": [], "glimpses": []}
    std = torch.full((2,), model.location_std).double() if model.log_std is None else model.log_std.exp()
    for b, count in enumerate(steps.tolist()):
        h = c = torch.zeros(1, H, dtype=torch.float64)
        log_probs, baselines, glimpses = [], [], []
        for t in range(count):
            policy = Normal(model.locator(h.detach())[0], std)
            log_prob = policy.log_prob(locations[b, t]).sum()
            baselines.append(model.baseline(h.detach())[0, 0])
            seen = rk.glimpse(
                image[b : b + 1], locations[b : b + 1, t], model.glimpse_size, scales=model.scales,
                scale_factor=model.scale_factor,
            )  # fmt: skip
            glimpses.append(seen[0])
            g = model.glimpse_network(seen, locations[b : b + 1, t])
            gates = F.linear(g, model.core.weight_ih, model.core.bias_ih)
            gates = gates + F.linear(h, model.core.weight_hh, model.core.bias_hh)
            if model.core_type == "lstm":
                i, f, cell, o = gates.chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * cell.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                h = gates.relu()
            if model.stopper is not None and t < T - 1:
                stopped = torch.tensor(float(t == count - 1), dtype=torch.float64)
                log_prob = log_prob + Bernoulli(logits=model.stopper(h.detach())[0, 0]).log_prob(stopped)
            log_probs.append(log_prob)
        results["logits"].append(model.classifier(h)[0])
        for name, values in (("log_probs", log_probs), ("baselines", baselines), ("glimpses", glimpses)):
            part = torch.stack(values)
            results[name].append(torch.cat((part, part.new_zeros(T - count, *part.shape[1:]))))
    return {name: torch.stack(rows) for name, rows in results.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("samples", [1, 2])
def test_model(options: dict[str, Any], samples: int, training: bool) -> None:
    model = make_model(**options).train(training)
    image = make_image(model.channels).requires_grad_()
    output = model(image, samples=samples, generator=torch.Generator().manual_seed(3))
    lead = (samples,) if samples > 1 else ()
    assert output.logits.shape == (*lead, B, CLASSES) and output.steps.shape == (*lead, B)
    assert output.locations.shape == (*lead, B, T, 2) and not output.locations.requires_grad
    assert output.log_probs.shape == output.baselines.shape == (*lead, B, T)
    assert output.glimpses.shape == (*lead, B, T, model.scales, model.channels, 4, 4)
    stops = output.steps.unique().tolist()
    if not model.stop:
        assert stops == [T]
    elif training:
        assert len(stops) > 1

    rows = [RecurrentAttentionOutput(*parts) for parts in zip(*output, strict=True)] if samples > 1 else [output]
    for row in rows:
        expected = restate(model, image, row.locations, row.steps)
        weights = {name: torch.linspace(-1, 1, part.numel()).sin().view_as(part) for name, part in expected.items()}
        inputs = [image, *model.parameters()]
        for name in expected:
            found = getattr(row, name)
            torch.testing.assert_close(found, expected[name])
            grads = (
                torch.autograd.grad((part * weights[name]).sum(), inputs, retain_graph=True, materialize_grads=True)
                for part in (found, expected[name])
            )
            torch.testing.assert_close(*grads)
    if not training:
        # Where it stops is its mean, and so it is for every sample.
        assert all(row.locations.equal(rows[0].locations) for row in rows)
        h = torch.zeros(1, model.hidden_size, dtype=torch.float64)
        torch.testing.assert_close(rows[0].locations[:, 0], model.locator(h).expand(B, 2))
    elif samples > 1:
        assert not rows[0].locations.equal(rows[1].locations)


def test_stops_where_it_is_likelier() -> None:
    model = make_model(stop=True).eval()
    assert model.stopper is not None
    nn.init.zeros_(model.stopper.weight)
    for bias, steps in ((0.1, 1), (-0.1, T)):
        nn.init.constant_(model.stopper.bias, bias)
        assert model(make_image()).steps.tolist() == [steps] * B


def test_locations_are_drawn() -> None:
    model, image = make_model(location_std=0.3, stop=True), make_image().expand(B, 1, 11, 9)
    first, second, again = (model(image, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 1))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not second.locations.equal(first.locations)
    many = make_model(location_std=0.3)(image, samples=500).locations[..., 0, :]  # of h = 0, all of one distribution
    assert (many.std((0, 1)) - 0.3).abs().max() < 0.02
    bias = make_model().locator.bias
    assert (many.mean((0, 1)) - bias).abs().max() < 0.03


def test_who_learns_from_what() -> None:
    """Classification does not move the eye, and REINFORCE does not change what it sees."""
    model = make_model(stop=True, learn_std=True)
    seeing = {
        name for name, _ in model.named_parameters() if name.split(".")[0] in ("glimpse_network", "core", "classifier")
    }
    output = model(make_image(), samples=4)
    for part, expected in (
        (output.logits, seeing),
        (output.log_probs, {"locator.weight", "locator.bias", "stopper.weight", "stopper.bias", "log_std"}),
        (output.baselines, {"baseline.weight", "baseline.bias"}),
    ):
        grads = torch.autograd.grad(part.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        assert {n for (n, _), g in zip(model.named_parameters(), grads, strict=True) if g is not None} == expected
    model.zero_grad()
    model.reinforce_loss(output, torch.arange(B), glimpse_cost=0.1).backward()
    assert all(p.grad is not None and p.grad.count_nonzero() > 0 for p in model.parameters())


@pytest.mark.parametrize("samples", [1, 3])
def test_reinforce_loss(samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lead = (samples,) if samples > 1 else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    logits, log_probs, baselines = (normal(B, n).requires_grad_() for n in (CLASSES, T, T))
    steps = torch.randint(1, T + 1, (*lead, B), generator=generator)
    output = RecurrentAttentionOutput(logits, normal(B, T, 2), log_probs, baselines, normal(B, T, 1, 1, 2, 2), steps)
    target = torch.tensor([0, 4, 2, 2])
    found = reinforce_loss(output, target, glimpse_cost=0.2)
    assert found.shape == ()

    expected, n = 0.0, samples * B
    policy, regression = torch.zeros(2, n, T, dtype=torch.float64)
    flat = [part.detach().reshape(n, -1) for part in (logits, log_probs, baselines, steps)]
    for i, (logit, log_prob, baseline, (count,)) in enumerate(zip(*flat, strict=True)):
        y = int(target[i % B])
        expected -= float(logit.log_softmax(0)[y]) / n
        for t in range(int(count)):
            error = float(int(logit.argmax()) == y) - 0.2 * (int(count) - t) - float(baseline[t])
            policy[i, t], regression[i, t] = -error / n, -2 * error / n
            expected += (error**2 - float(log_prob[t]) * error) / n
    assert found.item() == pytest.approx(expected)
    grads = torch.autograd.grad(found, (log_probs, baselines))
    torch.testing.assert_close(grads, (policy.view_as(log_probs), regression.view_as(baselines)))
    assert 0 < policy.count_nonzero() < policy.numel()
    for bad, message in (
        (target[:2], "reinforce_loss: target must be (B,) = (4,), got (2,)"),
        (target.float(), "reinforce_loss: target must be int64, got float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
            reinforce_loss(output, bad)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reinforce_loss_is_computed_in_the_dtype_of_the_baselines(default: torch.dtype, dtype: torch.dtype) -> None:
    logits, nothing, steps = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 3, dtype=dtype), torch.tensor([3])
    baselines = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    output = RecurrentAttentionOutput(logits, nothing, nothing, baselines, nothing, steps)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        loss = reinforce_loss(output, torch.tensor([0]), glimpse_cost=0.1)
    finally:
        torch.set_default_dtype(before)
    assert loss.dtype == dtype
    (grad,) = torch.autograd.grad(loss, baselines)
    expected = -2 * (1 - 0.1 * torch.tensor([[3, 2, 1]], dtype=dtype))
    torch.testing.assert_close(grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_dtypes_and_autocast() -> None:
    image = make_image(dtype=torch.float32)
    pixels = (255 * image).to(torch.uint8)
    model = make_model(dtype=torch.float32, stop=True).eval()
    torch.testing.assert_close(model(pixels), model(pixels / 255))
    assert model(image.to(torch.bfloat16)).logits.dtype == torch.float32
    model = make_model(dtype=torch.bfloat16, learn_std=True)
    output = model(pixels)
    assert {name: part.dtype for name, part in output._asdict().items()} == {
        "logits": torch.bfloat16, "locations": torch.float32, "log_probs": torch.float32,
        "baselines": torch.float32, "glimpses": torch.bfloat16, "steps": torch.int64,
    }  # fmt: skip
    model.reinforce_loss(output, torch.arange(B)).backward()
    for core in ("rnn", "lstm"):
        model = make_model(dtype=torch.float32, stop=True, learn_std=True, core=core)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(image, samples=4)
            loss = reinforce_loss(output, torch.arange(B))
        assert output.glimpses.dtype == torch.bfloat16 and loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_training_step_reads_nothing_back(options: dict[str, Any]) -> None:
    """On the meta device there is nothing to read: whatever asks for a value fails."""
    with torch.device("meta"):
        model = RecurrentAttention(CLASSES, **options)
        image, target = torch.empty(B, model.channels, 28, 28), torch.empty(B, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    output = model(image, samples=3)
    assert output.locations.shape == (3, B, 6, 2) and output.logits.device.type == "meta"
    reinforce_loss(output, target).backward()
    optimizer.step()


@pytest.mark.cuda
def test_a_training_step_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    model = RecurrentAttention(10, stop=True).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    image, target = torch.rand(128, 1, 28, 28, device="cuda"), torch.randint(10, (128,), device="cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = reinforce_loss(model(image), target, glimpse_cost=0.01)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite()) and len(set(losses)) > 10
    assert any(not p.equal(old) for p, old in zip(model.parameters(), before, strict=True))


def test_backend() -> None:
    with rk.use_backend("reference"):
        assert RecurrentAttention(10)(torch.rand(2, 1, 28, 28)).logits.shape == (2, 10)
    assert RecurrentAttention(10, backend="reference")(torch.rand(0, 1, 28, 28)).logits.shape == (0, 10)


def test_compiles(fresh_compiler: None) -> None:
    model = make_model(**EVERYTHING).eval()
    image = make_image(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model(image))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RecurrentAttention(0), "RecurrentAttention: num_classes must be at least 1, got 0"),
        (lambda: RecurrentAttention(5, core="gru"), "RecurrentAttention: core must be one of rnn, lstm, got 'gru'"),
        (lambda: RecurrentAttention(5, glimpse="x"), "RecurrentAttention: glimpse must be one of additive, multi"),
        (lambda: RecurrentAttention(5, location_std=0), "RecurrentAttention: location_std must be positive, got 0"),
        (lambda: RecurrentAttention(5, glimpse_size=(1, 2, 3)), "RecurrentAttention: glimpse_size must be an int or a"),
        (lambda: RecurrentAttention(5, backend="gpu"), "RecurrentAttention: backend must be one of"),
        (lambda: GlimpseSensor(0), "GlimpseSensor: size must be at least 1, got 0"),
        (lambda: GlimpseSensor(4, scale_factor=-1), "GlimpseSensor: scale_factor must be positive, got -1"),
        (lambda: GlimpseSensor(4, mode="mean"), "GlimpseSensor: mode must be one of area, bilinear, kevinzakka, tf"),
        (lambda: GlimpseSensor(4, padding="same"), "GlimpseSensor: padding must be one of zeros, border, reflect, got"),
        (lambda: GlimpseSensor(4, coords="ij"), "GlimpseSensor: coords must be one of xy, yx, got 'ij'"),
        (lambda: GlimpseNetwork(features=1.5), "GlimpseNetwork: features must be an int, got 1.5"),
        (lambda: make_model()(torch.rand(4, 4)), "RecurrentAttention: image must be (B, C, H, W), got (4, 4)"),
        (lambda: make_model()(make_image(3)), "RecurrentAttention: image must be (B, C, H, W) with C = channels = 1"),
        (lambda: make_model()(make_image().int()), "RecurrentAttention: image must be float64 or float32 or bfloat16"),
        (lambda: make_model()(make_image().to("meta")), "RecurrentAttention: image must be on cpu as classifier.wei"),
        (lambda: make_model()(make_image(), samples=0), "RecurrentAttention: samples must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        call()
