"""The command recattn, also python -m recattn_kernels: info, check, bench.

It needs nothing but the package: argparse reads the command line, and tables are plain text where rich is missing. A
machine on which something is to be found out is often one that lacks what was not strictly needed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from recattn_kernels import backends, conformance, registry
from recattn_kernels.bench import console
from recattn_kernels.bench.environment import environment, support
from recattn_kernels.spec import OpSpec, Sample, tensors

# A check's quick form: samples of at most so many elements, so many of them an op, and the largest of all.
QUICK_ELEMENTS, QUICK_SAMPLES = 500, 12


def info(options: argparse.Namespace) -> int:
    """Versions, devices, and where each backend of each op runs."""
    env = environment()
    ops: list[dict[str, Any]] = []
    for spec in registry.OPS:
        for backend in ("reference", *spec.backends):
            usable, reason = support(spec, backend)
            ops.append({"op": spec.name, "backend": backend, "usable_on": usable, "reason": reason})
    if options.json:
        print(json.dumps({"environment": env, "ops": ops}, indent=1))
        return 0
    labels = {"cuda": "CUDA of torch", "cpu": "CPU", "capability": "instruction set of _cpu"}
    lines = [
        [labels.get(key, key), "none" if value is None else str(value)] for key, value in env.items() if key != "gpus"
    ]
    lines += [["GPU", f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']} GiB"] for g in env["gpus"]]
    lines += [] if env["gpus"] else [["GPU", "torch finds none"]]
    lines.append(["backend by default", backends.requested("info", None)])
    console.table("recattn_kernels", ("", ""), lines)
    console.table(
        "backends on this machine",
        ("op", "backend", "runs on", "why not"),
        [[r["op"], r["backend"], ", ".join(r["usable_on"]) or "-", r["reason"] or ""] for r in ops],
    )
    return 0


def require_backend(options: argparse.Namespace) -> None:
    if options.op is not None and options.backend not in (None, *registry.find(options.op).backends):
        raise ValueError(f"{options.op} has no backend {options.backend}: nothing to {options.command}")


def check(options: argparse.Namespace) -> int:
    """Compares every backend with the reference on this machine; 1 where one fails."""
    require_backend(options)
    lines, complaints = [], []
    specs = registry.OPS if options.op is None else (registry.find(options.op),)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with console.Progress(total=len(specs) * len(devices)) as progress:
        for spec in specs:
            if options.backend not in (None, *spec.backends):
                lines.append([spec.name, options.backend, "", "", "", "", "left out: the op has no such backend"])
            for device in devices:
                for backend in [name for name in spec.backends if options.backend in (None, name)]:
                    reason = backends.machine_refusal(backend, device)
                    if reason is not None:
                        lines.append([spec.name, backend, device, "", "", "", f"not run: {reason}"])
                        continue
                    dtypes = spec.dtypes[backend]
                    for dtype in dtypes[:: max(1, len(dtypes) - 1)] if options.quick else dtypes:
                        progress.step(f"checking {spec.name} {backend} {dtype} on {device}")
                        passed, ran, worst, wrong = check_samples(spec, backend, dtype, device, options.quick)
                        complaints += wrong
                        verdict = "fail" if wrong else "pass" if ran else "every sample refused"
                        name = str(dtype).removeprefix("torch.")
                        lines.append([spec.name, backend, device, name, f"{passed}/{ran}", f"{worst:.2f}", verdict])
                progress.advance(1)
    columns = ("op", "backend", "device", "dtype", "samples", "worst err/allowed", "")
    console.table("check against the float64 reference", columns, lines, right=columns[4:6])
    for text in complaints:
        print(f"FAILED {text}")
    return 1 if complaints else 0


def check_samples(
    spec: OpSpec, backend: str, dtype: torch.dtype, device: str, quick: bool
) -> tuple[int, int, float, list[str]]:
    """Samples passed and run, the worst err/allowed, and what is wrong. Samples that the backend refuses do not run."""
    passed = ran = 0
    worst, complaints = 0.0, []
    for sample in quick_samples(spec) if quick else spec.samples:
        args, kwargs = spec.arguments(sample, dtype, device)
        if backends.explain(spec.name, *args, **kwargs)[backend] is not None:
            continue
        ran += 1
        try:
            findings = conformance.compare(spec, sample, backend, dtype, device)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        else:
            wrong = [f"{f.name}: {f.complaint}" for f in findings if f.complaint is not None]
            worst = max([worst, *(f.ratio for f in findings)])
        passed += not wrong
        complaints += [f"{spec.name} {backend} {device} {dtype} {sample.name}: {text}" for text in wrong]
    return passed, ran, worst, complaints


def quick_samples(spec: OpSpec) -> Sequence[Sample]:
    """A few small samples, taken evenly over the list, and the largest, over which blocks work together: for tools that
    slow a kernel down a thousandfold."""

    def elements(sample: Sample) -> int:
        return sum(t.numel() for t in tensors(sample.make(torch.Generator().manual_seed(0))))

    by_size = {sample.name: elements(sample) for sample in spec.samples}
    small = [sample for sample in spec.samples if by_size[sample.name] <= QUICK_ELEMENTS]
    chosen = small[:: max(1, -(-len(small) // QUICK_SAMPLES))]
    rest = sorted((s for s in spec.samples if s not in chosen), key=lambda sample: by_size[sample.name], reverse=True)
    return [*chosen, *rest[:1]]


def bench(options: argparse.Namespace) -> int:
    """Times every op beside its peers, each result checked first; 1 where one is wrong."""
    from recattn_kernels.bench import report, runner, sweep, training

    require_backend(options)
    if options.plot is not None:
        import matplotlib  # noqa: F401  (to fail before minutes of work, not after)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    env = environment()
    file = None if options.json is None else report.results_file(options.json, env, device)
    plots = None if options.plot is None else options.plot / "chart.png"
    for option, path, given in (("--json", file, options.json), ("--plot", plots, options.plot)):
        try:
            if path is not None:
                report.try_writing(path)
        except OSError as error:
            raise ValueError(f"{option}: {given} cannot be written: {error.strerror}") from None
    dtypes = [getattr(torch, name) for name in options.dtype]
    how: dict[str, Any] = {"device": device, "backend": options.backend, "quick": options.quick}
    sweeps = sweep.select(options.op, options.workload, device) if options.plot is not None else []
    if options.workload is not None and sweeps:  # it names a sweep
        result = runner.Report(env)
    else:
        save = functools.partial(report.write_json, path=file) if file is not None else lambda _: None
        result = runner.run(op=options.op, workload=options.workload, dtypes=dtypes, after=save, **how)
    lines = [line for dtype in dtypes for line in sweep.run(result, sweeps, dtype=dtype, **how)]
    report.show(result)
    sweep.show(lines)
    if file is not None:
        print(report.write_json(result, file))
    if options.plot is not None:
        charts = report.plot(result.rows, options.plot)
        print("wrote", *charts, *sweep.plot(lines, options.plot, result.environment))
    failed = bool(result.failures)
    if options.op is None and options.workload is None:
        wrong = training.section(device, options.quick, options.backend)
        if wrong is not None:
            print(f"FAILED {wrong}")
            failed = True
    return int(failed)


def parser() -> argparse.ArgumentParser:
    ops = [spec.name for spec in registry.OPS]
    fused = list(dict.fromkeys(name for spec in registry.OPS for name in spec.backends))
    top = argparse.ArgumentParser(prog="recattn", description="Fused recurrent and attention kernels for PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command(info)
    sub.add_argument("--json", action="store_true", help="as JSON")
    for sub in (command(check), command(bench)):
        sub.add_argument("--op", choices=ops, help="only this op")
        sub.add_argument("--backend", choices=fused, help="only this fused backend")
        sub.add_argument("--device", choices=("cpu", "cuda"), help="default: what the machine has")
        sub.add_argument("--quick", action="store_true", help="less of everything")
    sub.add_argument("--workload", metavar="NAME", help="only this workload or, with --plot, this sweep")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    sub.add_argument(
        "--dtype", nargs="+", choices=dtypes, default=["float32"], help="one or several, one after the other"
    )
    results = (
        "write the results there; into a folder as <device>.json. A folder is one that exists, a path that ends in a"
        " separator, and a new one without .json. A file's results are replaced, but not by a run without rows"
    )
    sub.add_argument("--json", metavar="FILE", help=results)
    plot = "write a bar chart of each workload there; runs the sweeps too, in minutes, and draws time against size"
    sub.add_argument("--plot", type=Path, metavar="DIR", help=plot)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU")
        backends.requested(options.command, None)  # what RECATTN_BACKEND says
        status = options.run(options)
    except ModuleNotFoundError as error:
        sys.exit(f"recattn: {error}; pip install recattn_kernels[bench]")
    except ValueError as error:  # 2, as argparse has it: 1 means that a result is wrong
        print(f"recattn: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
