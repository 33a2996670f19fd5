"""The CUDA kernels of rnn, lstm and gru, emulated on the CPU."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation import GPU
from test_conformance import judge

from recattn_kernels import backends, conformance, registry
from recattn_kernels.ops import gpu
from recattn_kernels.ops import samples as random_tensors
from recattn_kernels.ops.gated import launch_plan
from recattn_kernels.ops.gated.spec import Samples
from recattn_kernels.spec import Sample, tensors

pytestmark = pytest.mark.usefixtures("cuda_on_the_cpu")

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
OPS = tuple(GATES)
# The others differ from these in what happens before a kernel is launched.
SAMPLES = (
    "plain", "wide", "one_element", "many_rows", "everything", "everything_reverse", "everything_batch_first",
    "no_steps", "no_rows", "no_units", "nan", "nan_past_the_end", "relu_everything_reverse", "layer_norm",
    "layer_norm_everything", "layer_norm_reverse", "original_plain", "original_wide", "original_everything",
    "original_everything_reverse", "original_everything_batch_first", "original_no_steps", "original_nan",
)  # fmt: skip
CLUSTERS = launch_plan.Gpu(132, 200_000, (9, 0))  # and nothing else is planned for it
EVERYTHING = ("everything", "layer_norm_everything", "original_everything")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def variants(op: str, T: int, B: int, H: int) -> list[Sample]:
    """Of the op, its kernels that normalise, and the gru's that resets before the product."""
    calls = Samples(GATES[op], has_c=op == "lstm")
    usual = {"reset": random_tensors.reset, "lengths": random_tensors.lengths, **calls.keep()}
    usual |= {"state": True, "bias_hh": random_tensors.bias}
    options: list[dict[str, Any]] = [{}, {"layer_norm": calls.layer_norm}]
    if op == "gru":
        options.append({"reset_after": False})
    return [calls.sample(f"variant_{i}", T, B, H, **usual, **own) for i, own in enumerate(options)]


@pytest.fixture(params=["across_grid", "in_cluster"])
def exchange(request: pytest.FixtureRequest, cuda_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU has one form of the exchange, and chooses among its plans."""
    if request.param == "in_cluster":
        every = launch_plan.candidates
        monkeypatch.setattr(gpu, "gpu_of", lambda device: CLUSTERS)
        monkeypatch.setattr(launch_plan, "candidates", lambda *args: (plan for plan in every(*args) if plan.cluster))


both_forms = pytest.mark.usefixtures("exchange")


def samples(op: str, names: tuple[str, ...] = SAMPLES) -> list[Sample]:
    return [sample for sample in registry.find(op).samples if sample.name in names]


@both_forms
@pytest.mark.parametrize("op", OPS)
def test_conforms(op: str) -> None:
    spec = registry.find(op)
    for sample in samples(op):
        judge(conformance.compare(spec, sample, "cuda", torch.float32))


@both_forms
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sixteen_bit(op: str, dtype: torch.dtype) -> None:
    spec = registry.find(op)
    for everything in samples(op, EVERYTHING):
        judge(conformance.compare(spec, everything, "cuda", dtype))
        judge(conformance.compare(spec, everything, "cuda", dtype, mixed=True))


@both_forms
@pytest.mark.parametrize("op", OPS)
def test_every_plan(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows to a block and many, many units and few, as another GPU or batch would have them."""
    choose = random.Random(0)

    def launch(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        return choose.choice(list(launch_plan.candidates(problem, B, gpu)))

    monkeypatch.setattr(launch_plan, "launch_plan", launch)
    spec = registry.find(op)
    for sample in samples(op, ("many_rows", *EVERYTHING)):
        for dtype in (torch.float32, torch.bfloat16):
            judge(conformance.compare(spec, sample, "cuda", dtype))


@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_blocks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is taken in passes, and so are the sums over it."""
    monkeypatch.setattr(gpu, "gpu_of", lambda device: GPU._replace(multiprocessors=2))
    monkeypatch.setattr(launch_plan, "ROWS", 16)
    launch_plan.launch_plan.cache_clear()
    problem = launch_plan.Problem(GATES[op], 3, 4, True, True)
    plan = launch_plan.launch_plan(problem, 70, GPU._replace(multiprocessors=2))
    assert isinstance(plan, launch_plan.Plan) and plan.passes(70) > 2
    try:
        for sample in variants(op, 3, 70, 3):
            judge(conformance.compare(registry.find(op), sample, "cuda", torch.float32))
    finally:
        launch_plan.launch_plan.cache_clear()


@both_forms
@pytest.mark.parametrize("op", OPS)
def test_several_places_a_thread(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of weights that are read 16 bytes at a time."""
    B, H = 70, 40

    def most_rows(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        plan = max(launch_plan.candidates(problem, B, gpu), key=lambda plan: (plan.rows, plan.units))
        assert B == 1 or plan.rows * plan.units > 2 * launch_plan.THREADS
        return plan

    monkeypatch.setattr(launch_plan, "launch_plan", most_rows)
    plain, *others = variants(op, 4, B, H)
    judge(conformance.compare(registry.find(op), plain, "cuda", torch.bfloat16))
    for sample in (plain, *others):
        judge(conformance.compare(registry.find(op), sample, "cuda", torch.float32))


@pytest.mark.parametrize(("H", "units"), [(32, 8), (32, 2), (44, 12), (34, 6), (33, 5)])
@pytest.mark.parametrize("op", OPS)
def test_every_cluster(op: str, H: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few slices, and as many as there can be, which send each other words of 16 bytes to 2."""

    def launch(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        return launch_plan.laid_out(problem, units, rows=8, groups=launch_plan.ceil_div(B, 8), cluster=True)

    monkeypatch.setattr(launch_plan, "launch_plan", launch)
    for sample in variants(op, 3, 11, H):
        for dtype in (torch.float32, torch.bfloat16):
            judge(conformance.compare(registry.find(op), sample, "cuda", dtype))


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_more_rows_of_weights_than_a_warp_holds(op: str, cluster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        return launch_plan.laid_out(
            problem, launch_plan.UNITS, rows=8, groups=launch_plan.ceil_div(B, 8), cluster=cluster
        )

    monkeypatch.setattr(launch_plan, "launch_plan", launch)
    for sample in variants(op, 2, 11, 70):
        judge(conformance.compare(registry.find(op), sample, "cuda", torch.float32))


def test_more_slices_than_a_warp_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what rows are normalised by. An odd number of slices."""

    def one_unit_each(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        return launch_plan.laid_out(problem, units=1, rows=8, groups=1)

    monkeypatch.setattr(launch_plan, "launch_plan", one_unit_each)
    _, normed = variants("lstm", 2, 3, 67)
    judge(conformance.compare(registry.find("lstm"), normed, "cuda", torch.float32))


@both_forms
@pytest.mark.parametrize("op", OPS)
def test_every_order_of_threads_gives_the_same_bits(op: str) -> None:
    spec = registry.find(op)
    for sample in variants(op, 3, 6, 33):
        args, kwargs = spec.arguments(sample, torch.float32, "cpu")
        runs = []
        for _ in range(2):
            outputs = tensors(spec.function(*args, **kwargs, backend="cuda"))
            inputs = [t for t in tensors((args, kwargs)) if t.requires_grad]
            runs.append([*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_failed_launch_is_forgotten(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever launches next asks the runtime for its last error, and is not to be told of this one."""

    def most(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        return max(launch_plan.candidates(problem, B, gpu), key=lambda plan: plan.shared)

    more_than_any_block_has = launch_plan.Gpu(multiprocessors=64, shared=300_000)
    monkeypatch.setattr(gpu, "gpu_of", lambda device: more_than_any_block_has)
    monkeypatch.setattr(launch_plan, "launch_plan", most)
    with pytest.raises(RuntimeError, match="gated: the forward kernel: invalid value"):
        registry.find("rnn").function(torch.zeros(1, 1, 1024), torch.zeros(1024, 1024), backend="cuda")
    assert emulated.last_error() == 0


@both_forms
def test_every_warp_multiplies_more_than_it_reads_ahead() -> None:
    sample = Samples(1).sample("wider", 3, 2, 270, state=True, bias_hh=random_tensors.bias)
    judge(conformance.compare(registry.find("rnn"), sample, "cuda", torch.float32))


@both_forms
@pytest.mark.parametrize("op", OPS)
def test_tf32(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch allows it float32 loses digits, as many as TF32 has fewer and no more."""
    monkeypatch.setattr(backends, "allows_tf32", lambda: True)
    (sample,) = samples(op, ("everything",))
    findings = conformance.compare(registry.find(op), sample, "cuda", torch.float32)
    fewer = 2.0 ** (23 - 10)
    worst = max(finding.ratio for finding in findings)
    assert 1 < worst < fewer


def test_kernels_compiled_without_clusters(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the PTX of an older architecture: on a GPU that has clusters no plan has them."""
    seen = []

    def launch(problem: launch_plan.Problem, B: int, gpu: launch_plan.Gpu) -> launch_plan.Plan | str:
        plans = list(launch_plan.candidates(problem, B, gpu))
        seen.append(any(plan.cluster for plan in plans))
        return plans[0]

    monkeypatch.setattr(launch_plan, "launch_plan", launch)
    monkeypatch.setattr(gpu, "gpu_of", lambda device: CLUSTERS)
    x, weight_hh = torch.zeros(2, 1, 8), torch.zeros(8, 8)
    for compiled in (True, False):
        monkeypatch.setattr(emulated, "gated_clusters", lambda compiled=compiled: compiled)
        seen.clear()
        registry.find("rnn").function(x, weight_hh, backend="cuda")
        assert seen[-1] == compiled


def test_a_launch_without_a_plan_names_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch.compile, which does not ask before."""
    monkeypatch.setattr(launch_plan, "refusal", lambda *args: None)
    with pytest.raises(backends.BackendUnavailableError, match=r"^rnn: backend 'cuda' .*multiprocessors"):
        registry.find("rnn").function(torch.zeros(1, 1, 1024), torch.zeros(1024, 1024), backend="cuda")


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(*shape: int, **options: Any) -> str | None:
        x, weight_hh = torch.zeros(*shape), torch.zeros(shape[-1], shape[-1] // 3)
        return backends.explain("gru", x, weight_hh, **options)["cuda"]

    assert reason(2, 3, 15) is None
    assert reason(2, 3, 15, layer_norm=(torch.ones(15), torch.ones(15))) is None
    assert reason(2, 3, 15, reset_after=False) is None
    assert "multiprocessors" in str(reason(1, 1, 3 * 1024))
    with pytest.raises(backends.BackendUnavailableError, match=r"gru: backend 'cuda' .*multiprocessors"):
        registry.find("gru").function(torch.zeros(1, 1, 3072), torch.zeros(3072, 1024), backend="cuda")
    monkeypatch.setattr(gpu, "gpu_of", lambda device: GPU._replace(capability=(7, 5)))
    assert "capability" in str(reason(2, 3, 15))
