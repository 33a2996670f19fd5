"""Every layer as a citizen of torch.nn: devices, dtypes, initialisation, copies, files, repr and data parallelism."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, Uniform

import recattn_kernels as rk

T, B, D, H = 5, 3, 24, 32


class Case(NamedTuple):
    """A layer and how it is made: with required arguments, and with options none of which is the default."""

    name: str
    variant: str
    required: tuple[int, ...]
    options: dict[str, Any]

    def make(self, **factory: Any) -> Any:
        return getattr(rk, self.name)(*self.required, **self.options, **factory)


GATED: dict[str, Any] = {
    "bias": False, "layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.1, "grad_clip": 1.0,
    "backend": "reference",
}  # fmt: skip
STACKED = {"num_layers": 2, "batch_first": True, "dropout": 0.1, "bidirectional": True}
CASES = [
    Case("RNN", "plain", (D, H), {}),
    Case("RNN", "everything", (D, H), {**STACKED, **GATED}),
    Case("LSTM", "plain", (D, H), {}),
    Case("LSTM", "everything", (D, H), {**STACKED, **GATED, "zoneout": (0.2, 0.1)}),
    Case("LSTM", "projected", (D, H), {"proj_size": 5, "num_layers": 2, "layer_norm": True}),
    Case("GRU", "plain", (D, H), {}),
    Case("GRU", "everything", (D, H), {**STACKED, **GATED}),
    Case("RNNCell", "plain", (D, H), {}),
    Case("RNNCell", "everything", (D, H), {"nonlinearity": "relu", **GATED}),
    Case("LSTMCell", "plain", (D, H), {}),
    Case("LSTMCell", "everything", (D, H), {**GATED, "zoneout": (0.2, 0.1)}),
    Case("GRUCell", "plain", (D, H), {}),
    Case("GRUCell", "everything", (D, H), GATED),
    Case("IndRNN", "plain", (D, H), {}),
    Case("IndRNN", "everything", (D, H), {
        **STACKED, "bias": False, "nonlinearity": "tanh", "norm": "after", "residual": True, "recurrent_max": 0.9,
        "grad_clip": 1.0, "backend": "reference",
    }),
    Case("IndRNN", "norm before", (D, H), {"num_layers": 2, "norm": "before", "sequence_length": 4}),
    Case("IndRNNCell", "plain", (D, H), {}),
    Case("IndRNNCell", "everything", (D, H), {
        "bias": False, "nonlinearity": "tanh", "recurrent_max": 1.5, "backend": "reference",
    }),
    Case("SlotAttention", "plain", (4, H), {}),
    Case("SlotAttention", "everything", (4, H), {
        "input_dim": D, "iters": 2, "mlp_dim": 20, "heads": 2, "eps": 1e-6, "eps_mode": "denominator",
        "temperature": 0.5, "head_softmax": "joint", "bias": True, "ln_eps": 1e-3, "init": "learned",
        "update": "residual", "grad_mode": "bi-level", "backend": "reference",
    }),
    Case("GlimpseSensor", "plain", (4,), {}),
    Case("GlimpseSensor", "everything", (4,), {
        "scales": 2, "scale_factor": 1.5, "zoom": 2.0, "mode": "bilinear", "padding": "border", "coords": "yx",
        "backend": "reference",
    }),
    Case("GlimpseNetwork", "plain", (), {}),
    Case("GlimpseNetwork", "everything", (), {
        "channels": 2, "glimpse_size": (4, 3), "scales": 2, "hidden_size": H, "features": D,
        "glimpse": "multiplicative",
    }),
    Case("RecurrentAttention", "plain", (7,), {}),
    Case("RecurrentAttention", "everything", (7,), {
        "channels": 2, "glimpse_size": 4, "scales": 2, "num_glimpses": 3, "scale_factor": 1.5, "hidden_size": H,
        "core": "lstm", "glimpse": "multiplicative", "location_std": 0.2, "learn_std": True, "stop": True,
        "backend": "reference",
    }),
    Case("AdditiveAttention", "plain", (D, H, 20), {}),
    Case("AdditiveAttention", "everything", (D, H, 20), {"activation": "relu", "bias": False, "backend": "reference"}),
    Case("AttentionLSTMCell", "plain", (D, H, 20, 16), {}),
    Case("AttentionLSTMCell", "everything", (D, H, 20, 16), {
        "gate": False, "activation": "relu", "backend": "reference",
    }),
]  # fmt: skip

# What a layer is called with; N(0, 1) of a shape is drawn by randn.
INPUTS: dict[str, Callable[[Any, Callable[..., Tensor]], tuple[Any, ...]]] = {
    "RNN": lambda layer, randn: (randn(T, B, D),),  # under batch_first B is T
    "LSTM": lambda layer, randn: (randn(T, B, D),),
    "GRU": lambda layer, randn: (randn(T, B, D),),
    "IndRNN": lambda layer, randn: (randn(T, B, D),),
    "RNNCell": lambda layer, randn: (randn(B, D), randn(B, H)),
    "LSTMCell": lambda layer, randn: (randn(B, D), (randn(B, H), randn(B, H))),
    "GRUCell": lambda layer, randn: (randn(B, D), randn(B, H)),
    "IndRNNCell": lambda layer, randn: (randn(B, D), randn(B, H)),
    "SlotAttention": lambda layer, randn: (randn(B, 9, layer.input_dim),),
    "GlimpseSensor": lambda layer, randn: (randn(B, 2, 13, 11), randn(B, 2)),
    "GlimpseNetwork": lambda layer, randn: (
        randn(B, layer.scales, layer.channels, *((8, 8) if layer.glimpse_size == 8 else layer.glimpse_size)),
        randn(B, 2),
    ),
    "RecurrentAttention": lambda layer, randn: (randn(B, layer.channels, 13, 11),),
    "AdditiveAttention": lambda layer, randn: (randn(B, D), randn(B, 9, H)),
    "AttentionLSTMCell": lambda layer, randn: (randn(B, D), (randn(B, H), randn(B, H)), randn(B, 9, 20)),
}

every_layer = pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{case.variant}" for case in CASES])


def inputs_of(
    case: Case, layer: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 1.0
) -> Any:
    generator = torch.Generator().manual_seed(1)
    return INPUTS[case.name](layer, lambda *shape: (scale * torch.randn(shape, generator=generator)).to(device, dtype))


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def run(layer: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What it gives in training, then in evaluation, whatever it draws."""
    results = []
    for training in (True, False):
        torch.manual_seed(0)
        results += tensors(layer.train(training)(*inputs))
    return results


def loss_of(result: Any) -> Tensor:
    found = [t for t in tensors(result) if t.requires_grad]
    return torch.stack([(t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found]).sum()


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert any(t.any() for t in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_layer_is_missing() -> None:
    layers = {
        name for name in rk.__all__ if inspect.isclass(getattr(rk, name)) and issubclass(getattr(rk, name), nn.Module)
    }
    assert layers == {case.name for case in CASES} == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_no_option_is_missing(name: str) -> None:
    """Every argument of the constructor's that has a default is another one in some case."""
    signature = inspect.signature(getattr(rk, name)).parameters.values()
    optional = {p.name for p in signature if p.default is not p.empty} - {"device", "dtype"}
    assert optional and optional == {o for case in CASES if case.name == name for o in case.options if o in optional}


@every_layer
def test_dtype(case: Case) -> None:
    layer = case.make(dtype=torch.float64)
    assert {t.dtype for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()} <= {torch.float64}
    outputs = [t for t in run(layer, inputs_of(case, layer, torch.float64)) if t.is_floating_point()]
    assert outputs and {t.dtype for t in outputs} == {torch.float64}


@every_layer
def test_skip_init(case: Case) -> None:
    layer, expected = nn.utils.skip_init(type(case.make()), *case.required, **case.options), case.make()
    layer.load_state_dict(expected.state_dict())
    assert_same(run(layer, inputs_of(case, layer)), run(expected, inputs_of(case, expected)))


@every_layer
def test_meta_device(case: Case) -> None:
    layer, expected = case.make(device="meta"), case.make()
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    on_meta = run(layer, inputs_of(case, layer, device="meta"))
    assert all(t.is_meta for t in on_meta)
    on_cpu = run(expected, inputs_of(case, expected))
    assert [(t.shape, t.dtype) for t in on_meta] == [(t.shape, t.dtype) for t in on_cpu]


@every_layer
def test_a_batch_of_gradients(case: Case) -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    layer = case.make().eval()
    inputs = inputs_of(case, layer)
    if case.name in ("RNN", "LSTM", "GRU", "AdditiveAttention", "SlotAttention"):
        inputs = tuple(t.repeat(1, 8, 1) for t in inputs) if case.name[-1] in "NMU" else inputs
    outputs = [t for t in tensors(layer(*inputs)) if t.requires_grad]
    parameters = [p for p in layer.parameters() if p.requires_grad]
    if not outputs:
        pytest.skip("the layer has no parameters")
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(2, *t.shape, generator=generator) for t in outputs]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(outputs, parameters, grads, is_grads_batched=True, **options)
    for i in range(2):
        expected = torch.autograd.grad(outputs, parameters, [g[i] for g in grads], **options)
        for one, other in zip(found, expected, strict=True):  # torch's products beside ours
            torch.testing.assert_close(one[i], other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))


def documented(layer: Any, name: str) -> Distribution | float | str:
    """Where the parameter or buffer of that name starts, by the layer's docstring."""
    path, _, own = name.rpartition(".")
    module = layer.get_submodule(path)
    if isinstance(layer, rk.SlotAttention) and not isinstance(module, nn.LayerNorm):
        if own in ("slots_mu", "slots_log_sigma"):
            bound = math.sqrt(6 / (getattr(layer, own).shape[1] + layer.dim))
        elif own == "weight_hh":
            return "orthogonal"
        elif own.startswith("bias"):
            return 0.0
        else:
            bound = math.sqrt(6 / sum(getattr(module, own).shape))
    elif isinstance(module, (rk.IndRNN, rk.IndRNNCell)):
        if own.startswith("weight_ih"):
            return Normal(0.0, 0.01)
        if own.startswith("bias"):
            return 0.0
        low, length = 0.0, getattr(module, "sequence_length", None)
        if length is not None and own.startswith(f"weight_hh_l{layer.num_layers - 1}"):
            low = 2 ** (-1 / length)
        return Uniform(low, module.recurrent_max or 1.0)
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)) or own.startswith("ln_"):
        return float("weight" in own or own == "running_var")
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        bound = module.hidden_size**-0.5
    elif isinstance(layer, rk.RecurrentAttention) and name == "stopper.bias":
        return -math.log(layer.num_glimpses)
    elif isinstance(layer, rk.RecurrentAttention) and name == "log_std":
        return math.log(layer.location_std)
    elif isinstance(module, rk.AdditiveAttention):
        bound = module.attn_dim**-0.5
    else:
        assert isinstance(module, nn.Linear)
        bound = module.in_features**-0.5
    return Uniform(-bound, bound)


def assert_starts_as_documented(layer: nn.Module, draws: list[dict[str, Tensor]]) -> None:
    """draws: state_dicts of the layer, each after an initialisation."""
    for name in draws[0]:
        values, start = torch.stack([state[name] for state in draws]), documented(layer, name)
        if isinstance(start, float):
            assert torch.allclose(values, torch.full_like(values, start)), name
        elif isinstance(start, str):
            for value in values:
                torch.testing.assert_close(value.T @ value, torch.eye(value.shape[1]))
        else:
            assert start.support.check(values).all(), name
            # Within five standard errors of the mean and of the deviation; the second by the kurtosis.
            n, kurtosis = values.numel(), 1.8 if isinstance(start, Uniform) else 3.0
            assert abs(values.mean() - start.mean) <= 5 * start.stddev / math.sqrt(n), name
            assert abs(values.std() - start.stddev) <= 5 * start.stddev * math.sqrt((kurtosis - 1) / 4 / n), name


def initialised(layer: nn.Module) -> dict[str, Tensor]:
    layer.reset_parameters()
    return copy.deepcopy(layer.state_dict())


@every_layer
def test_initialisation(case: Case) -> None:
    layer = case.make()
    if not list(layer.parameters()):
        return
    assert_starts_as_documented(layer, [case.make().state_dict() for _ in range(30)])
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(3.0)
    run(layer, inputs_of(case, layer))  # fills the buffers
    from_meta = case.make(device="meta").to_empty(device="cpu")
    assert_starts_as_documented(from_meta, [initialised(from_meta) for _ in range(30)])
    states = []
    for other in (layer, from_meta):
        torch.manual_seed(2)
        states.append(initialised(other))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert_same(run(from_meta, inputs_of(case, layer)), run(layer, inputs_of(case, layer)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
@every_layer
def test_copies(case: Case, how: str) -> None:
    layer = case.make()
    inputs = inputs_of(case, layer)
    run(layer, inputs)  # fills the buffers
    file = io.BytesIO()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        torch.save(layer, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        torch.save(layer.state_dict(), file)
        other = case.make()
        other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert type(other) is type(layer) and repr(other) == repr(layer)
    expected = run(copy.deepcopy(layer), inputs)
    assert_same(run(other, inputs), expected)

    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_same(run(layer, inputs), expected)
    if list(other.parameters()):
        assert not all(a.equal(b) for a, b in zip(run(other, inputs), expected, strict=True))


@every_layer
def test_extra_repr(case: Case) -> None:
    """Every argument without a default, and of the others those that are changed."""
    layer = case.make()
    shown = layer.extra_repr()
    found = dict(re.findall(r"(\w+)=((?:\([^)]*\)|[^,])*)", shown))
    required = [p.name for p in inspect.signature(type(layer)).parameters.values() if p.default is p.empty]
    assert set(case.options) <= set(found) <= {*case.options, *required}
    for name, value in case.options.items():
        assert found[name] in (repr(value), str(value))  # torch.nn's cells leave the quotes out
    named = [f"{name}={value}" for name, value in zip(required, case.required, strict=False)]
    assert shown.startswith((", ".join(map(str, case.required)), ", ".join(named)))


class Model(nn.Module):
    """Around every layer: one without a parameter DistributedDataParallel would not take."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, input: Tensor, *others: Any) -> Any:
        return self.layer(self.scale * input, *others)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_layer
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(case: Case) -> None:
    model = Model(case.make())
    alone = copy.deepcopy(model)
    inputs = inputs_of(case, model.layer)
    for run_model in (nn.parallel.DistributedDataParallel(model), alone):
        for _ in range(2):  # the second would fail if a parameter had been left without a gradient
            torch.manual_seed(0)
            loss_of(run_model(*inputs)).backward()
    grads, expected = ({name: p.grad for name, p in m.named_parameters()} for m in (model, alone))
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)
    assert all(g.isfinite().all() for g in expected.values()) and any(g.any() for g in expected.values())
    torch.testing.assert_close(dict(model.named_buffers()), dict(alone.named_buffers()), rtol=0, atol=0)
