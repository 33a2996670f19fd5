"""Runs benchmarks: each implementation is checked against the reference, then all of a workload are timed in turn."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import Tensor

from recattn_kernels import backends, conformance, registry
from recattn_kernels.bench import peers, timing
from recattn_kernels.bench.console import Progress
from recattn_kernels.bench.environment import environment
from recattn_kernels.bench.memory import peak_bytes
from recattn_kernels.bench.peers import Case, Impl
from recattn_kernels.conformance import Result
from recattn_kernels.spec import OpSpec, Workload, tensors

PASSES = ("fwd", "fwd+bwd")

# Above this a call is not run once more under the profiler: seconds of a sequence that torch walks step by step.
PROFILED_MS = 1000.0

# What peers.build gives: rows to be, and those that cannot run, with the reason.
Build = Callable[[Case], tuple[list[Impl], dict[str, str]]]

# The gradients of the outputs; what the definition gives with them in the dtype, and exactly.
References = tuple[list[Tensor | None], Result, Result]

Row = TypedDict(
    "Row",
    {
        "op": str,
        "workload": str,
        "device": str,
        "dtype": str,
        "pass": str,
        "impl": str,
        "median_ms": float | None,  # None: the result was wrong, so it was not timed
        "p10_ms": float | None,
        "p90_ms": float | None,
        "bytes": int,  # the least to move: every input read once, every output written once
        "flops": int,
        "peak_bytes": int | None,  # what the call holds at most, its outputs included; None: not measured
        # None: there is nothing to check it against. A name: not checked here, but at that smaller workload.
        "checked": bool | str | None,
    },
)


@dataclass
class Report:
    environment: dict[str, Any] = field(default_factory=environment)
    rows: list[Row] = field(default_factory=list)
    sweeps: list[Row] = field(default_factory=list)  # apart from rows: no table has them
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    failures: list[str] = field(default_factory=list)  # what was wrong

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def select(op: str | None, workload: str | None, device: str, quick: bool) -> list[tuple[OpSpec, Workload]]:
    """The workloads to run; quick: only the one of each op that moves the fewest bytes."""
    specs = registry.OPS if op is None else (registry.find(op),)
    chosen = []
    for spec in specs:
        fitting = [w for w in spec.workloads if device in w.devices and workload in (None, w.name)]
        by_size = sorted(fitting, key=lambda w, spec=spec: spec.cost(w, torch.float32, False)[0])  # type: ignore[misc]
        chosen += [(spec, w) for w in (by_size[:1] if quick else fitting)]
    if not chosen:
        names = sorted({w.name for spec in specs for w in spec.workloads if device in w.devices})
        raise ValueError(f"workload must be one of {', '.join(names)} on {device}, got {workload!r}")
    return chosen


def run(
    *,
    op: str | None = None,
    workload: str | None = None,
    device: str = "cpu",
    backend: str | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    quick: bool = False,
    after: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Benchmarks the chosen workloads. backend: the only fused one to time; peers are timed beside it all the same.

    after: called with what there is after each workload, as a run may be stopped before its end.
    """
    chosen = [(*pair, dtype) for dtype in dtypes for pair in select(op, workload, device, quick)]
    report = Report()
    with Progress(total=len(chosen)) as progress, products_alike(device):
        for spec, work, dtype in chosen:
            if device == "cpu":
                timing.keep_freed_memory(reserve=2 * spec.cost(work, dtype, True)[0])
            # On a GPU each variant has a row too, which shows whether auto's rule chooses well.
            variants = ({}, *(v for v in spec.variants if v)) if device == "cuda" else ({},)
            build = functools.partial(peers.build, backend=backend, variants=variants)
            run_workload(report, progress, spec, work, device, dtype, quick, build)
            after(report)
    return report


def products_alike(device: str) -> contextlib.AbstractContextManager[Any]:
    """cuDNN multiplies float32 as torch's own products do: by default it takes TF32 where they do not."""
    if device != "cuda":
        return contextlib.nullcontext()
    cudnn = torch.backends.cudnn
    manager: contextlib.AbstractContextManager[Any] = cudnn.flags(enabled=True, allow_tf32=backends.allows_tf32())
    return manager


def run_workload(
    report: Report,
    progress: Progress,
    spec: OpSpec,
    work: Workload,
    device: str,
    dtype: torch.dtype,
    quick: bool,
    build: Build,
    effort: timing.Effort | None = None,
    checked_at: Mapping[str, str] = MappingProxyType({}),
    profiled_ms: float = PROFILED_MS,
) -> dict[str, float]:
    """Checks and times what `build` gives, and adds to the report. Returns the seconds that checking each took.

    checked_at: {row: the smaller workload at which it was checked} for rows that are not to be checked again.
    """
    # What was compiled for one workload is of no use to the next, and would count as its recompilation.
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    title = f"{spec.name} {work.name}"
    copies = []  # several on a GPU: see timing.rotation
    for seed in range(timing.rotation(device, spec.cost(work, dtype, False)[0])):
        args, kwargs = spec.inputs(work, dtype, device, torch.Generator().manual_seed(seed))
        impls, refused = build(Case(spec, work, dtype, device, args, kwargs, compile=not quick))
        copies.append(impls)
    for name, reason in refused.items():
        report.note(f"{spec.name}: {name} is left out: {reason}")

    def failed(impl: Impl, error: object) -> None:
        refused = impl.may_refuse and isinstance(error, backends.BackendUnavailableError)
        what = "is left out" if refused else "fails"
        text = f"{title}: {impl.name} {what}: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
        report.failures.append(text) if impl.ours and not refused else report.note(text)

    wrong, out = set[str](), set[str]()
    references: dict[int, References] = {}
    seconds: dict[str, float] = {}
    for impl in copies[0]:
        if impl.name in checked_at:
            continue
        progress.step(f"{title}: checking {impl.name}")
        start = time.perf_counter()
        try:
            complaint = check(impl, dtype, references)
        except torch.OutOfMemoryError:  # float64 and the reference's graph take many times what a kernel does
            report.note(f"{title}: {impl.name} is left out: checking it needs more memory than the device has")
            out.add(impl.name)
            continue
        except Exception as error:
            failed(impl, error)
            out.add(impl.name)
            continue
        if complaint is not None:
            report.failures.append(f"{title}: {impl.name} is wrong: {complaint}")
            wrong.add(impl.name)
        seconds[impl.name] = time.perf_counter() - start
    references.clear()
    progress.advance(0.2)

    effort = effort or (timing.QUICK if quick else timing.Effort())
    grads: dict[tuple[int, torch.Size], Tensor] = {}
    for pass_ in PASSES:
        # Of integers nothing is differentiated.
        backward = pass_ == "fwd+bwd"
        indexes = [i for i, m in enumerate(copies[0]) if m.name not in wrong | out and (m.inputs or not backward)]
        calls = [[caller(pass_, impls[i], n, grads) for n, impls in enumerate(copies)] for i in indexes]
        progress.step(f"{title}: timing {pass_}")
        measured = timing.measure(calls, timing.stopwatch(device), effort, tick=progress.advance)
        timings = dict(zip(indexes, measured, strict=True))
        progress.advance(0.4)
        progress.step(f"{title}: memory of {pass_}")
        for i, impl in enumerate(copies[0]):
            timed = timings.get(i)
            if isinstance(timed, Exception):
                failed(impl, timed)
                out.add(impl.name)
            elif timed is not None:
                peak = peak_bytes(calls[indexes.index(i)][0], device) if timed.median_ms <= profiled_ms else None
                checked = checked_at.get(impl.name, True)
                report.rows.append(_row(spec, work, device, dtype, pass_, impl, timed, peak, checked))
            elif impl.name in wrong:
                report.rows.append(_row(spec, work, device, dtype, pass_, impl, None, None, False))
    return seconds


def caller(pass_: str, impl: Impl, copy: int, grads: dict[tuple[int, torch.Size], Tensor]) -> Callable[[], object]:
    """The call to time. grads holds the output gradients: fixed, contiguous, and one for all outputs of a shape."""

    def forward() -> object:
        with torch.no_grad():
            return impl.call()

    inputs = impl.inputs

    def forward_backward() -> object:
        output = tensors(impl.call())[0]
        grad = grads.get((copy, output.shape))
        if grad is None:  # in the warm-up
            grad = grads[copy, output.shape] = torch.randn_like(output, memory_format=torch.contiguous_format)
        return torch.autograd.grad(output, inputs, grad)

    return forward if pass_ == "fwd" else forward_backward


def check(impl: Impl, dtype: torch.dtype, references: dict[int, References]) -> str | None:
    """What is wrong with an implementation, by the rule of conformance.py: without gradients, and with them.

    references keeps what a definition gives for the next implementations that share it.
    """
    if impl.definition is None:
        return None
    args, kwargs = impl.args, dict(impl.kwargs)
    if id(impl.definition) not in references:
        references.clear()  # in float64, the largest tensors of all
        outputs = conformance.evaluate(impl.definition, args, kwargs, None).outputs
        device = outputs[0].device.type
        grads = conformance.output_gradients(outputs, torch.Generator().manual_seed(1), used=[0])
        exact_args, exact_kwargs, exact_grads = (conformance.exactly(v, device) for v in (args, kwargs, grads))
        references[id(impl.definition)] = (
            grads,
            conformance.evaluate(impl.definition, args, kwargs, grads),
            conformance.evaluate(impl.definition, exact_args, exact_kwargs, exact_grads),
        )
    grads, reference, exact = references[id(impl.definition)]
    names = [f"input {i}" for i in range(len(impl.inputs))]

    def call(*_: Any, **__: Any) -> Any:
        return impl.call()

    for grad_outputs in (None, grads):
        with torch.set_grad_enabled(grad_outputs is not None):
            actual = conformance.evaluate(call, args, kwargs, grad_outputs)
        for finding in conformance.judge(actual, reference, exact, names, dtype):
            if finding.complaint is not None and finding.err > impl.slack * finding.allowed:
                return f"{finding.name}: {finding.complaint}"
    return None


def _row(
    spec: OpSpec,
    work: Workload,
    device: str,
    dtype: torch.dtype,
    pass_: str,
    impl: Impl,
    timed: timing.Timing | None,
    peak: int | None,
    checked: bool | str,
) -> Row:
    backward = pass_ == "fwd+bwd"
    bytes_, flops = impl.cost(backward) if impl.cost is not None else spec.cost(work, dtype, backward)
    return {
        "op": spec.name,
        "workload": work.name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": pass_,
        "impl": impl.name,
        "median_ms": None if timed is None else round(timed.median_ms, 6),
        "p10_ms": None if timed is None else round(timed.p10_ms, 6),
        "p90_ms": None if timed is None else round(timed.p90_ms, 6),
        "bytes": bytes_,
        "flops": flops,
        "peak_bytes": peak,
        "checked": None if impl.definition is None else checked,
    }
