"""Lines of time against one number, such as the length of a sequence: the sweeps that each op's spec declares.

A point of a line is a row like any other: checked first, then timed in turn with the other lines. Every variant of
every backend is a line, and so is every peer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recattn_kernels import registry
from recattn_kernels.bench import console, peers, report, timing
from recattn_kernels.bench.peers import Case, Impl
from recattn_kernels.bench.runner import PASSES, Report, Row, run_workload
from recattn_kernels.spec import OpSpec, Sweep, Workload

# A line ends once a call of it takes longer than this: what follows can be told from its slope.
LIMIT_MS = 2000.0
# The line of a peer also ends once checking it has taken so long in all: there it is compiled, anew for every shape.
CHECKING_S = 60.0
# Where a forward in float64 moves more than this nothing is checked: a check holds many times as much.
CHECK_BYTES = 1 << 29
# Longer sequences are compiled in chunks of at most so many steps: all of a sweep over time are then one line.
UNROLL = 32
EFFORT = timing.Effort(budget_s=0.5, slow_s=1.0)
QUICK_STRIDE = 4  # quick: one value in so many


@dataclass
class Lines:
    """One sweep, measured: its rows, and which lines are the package's own."""

    spec: OpSpec
    sweep: Sweep
    device: str
    dtype: torch.dtype
    rows: list[Row] = field(default_factory=list)
    ours: set[str] = field(default_factory=set)

    @property
    def title(self) -> str:
        """indrnn against T: B 4, H 128, float32"""
        sizes = list(self.sweep.sizes.values())
        fixed = [f"{name} {n}" for name, n in sizes[0].items() if all(other[name] == n for other in sizes)]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.name} against {self.sweep.over}: {', '.join([*fixed, dtype])}"

    def names(self) -> list[str]:
        """The lines that have a point."""
        return list(dict.fromkeys(row["impl"] for row in self.rows if row["median_ms"] is not None))

    def points(self, name: str, pass_: str) -> dict[int, float]:
        """One line: {value: median ms}."""
        values = {work.name: value for value, work in self.sweep.workloads().items()}
        return {
            values[row["workload"]]: row["median_ms"]
            for row in self.rows
            if row["impl"] == name and row["pass"] == pass_ and row["median_ms"] is not None
        }


def select(op: str | None, name: str | None, device: str) -> list[tuple[OpSpec, Sweep]]:
    """The sweeps to run; name: only those of this name, of which there may be none."""
    specs = registry.OPS if op is None else (registry.find(op),)
    return [(spec, s) for spec in specs for s in spec.sweeps if device in s.devices and name in (None, s.name)]


def run(
    to: Report,
    chosen: Sequence[tuple[OpSpec, Sweep]],
    *,
    device: str = "cpu",
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> list[Lines]:
    """Measures the sweeps, and adds rows, notes and failures to a report. The options are those of runner.run."""
    measured = []
    stride = QUICK_STRIDE if quick else 1
    with console.Progress(total=sum(len(list(sweep.sizes)[::stride]) for _, sweep in chosen)) as progress:
        for spec, sweep in chosen:
            lines = Lines(dataclasses.replace(spec, inputs=sweep.inputs or spec.inputs), sweep, device, dtype)
            _Run(lines, to, progress, backend, quick).points(list(sweep.workloads().values())[::stride])
            to.sweeps += lines.rows
            measured.append(lines)
    return measured


@dataclass
class _Run:
    """One sweep on its way: which lines have ended, and where each was checked last."""

    lines: Lines
    report: Report
    progress: console.Progress
    backend: str | None
    quick: bool
    ended: set[str] = field(default_factory=set)
    checked_at: dict[str, str] = field(default_factory=dict)
    checking_s: Counter[str] = field(default_factory=Counter)

    def points(self, works: Sequence[Workload]) -> None:
        spec, dtype = self.lines.spec, self.lines.dtype
        if self.lines.device == "cpu":
            timing.keep_freed_memory(reserve=2 * spec.cost(works[-1], dtype, True)[0])
        for work in works:
            self.point(work, last=work is works[-1])

    def point(self, work: Workload, last: bool) -> None:
        spec, lines = self.lines.spec, self.lines
        # Checking runs the reference: where its line has ended, the smaller workload that was checked has to do.
        checking = peers.label("reference", spec.variants[0]) not in self.ended
        checking &= spec.cost(work, torch.float64, False)[0] <= CHECK_BYTES
        built: dict[str, Impl] = {}

        def build(case: Case) -> tuple[list[Impl], dict[str, str]]:
            case = dataclasses.replace(case, unroll=UNROLL, sweep=True)
            impls, refused = peers.build(case, self.backend, spec.variants)
            chosen = [impl for impl in impls if impl.name not in self.ended]
            if not checking:
                chosen = [impl for impl in chosen if impl.definition is None or impl.name in self.checked_at]
            built.update((impl.name, impl) for impl in chosen)
            return chosen, refused

        part = Report(self.report.environment)
        seconds = run_workload(
            part, self.progress, spec, work, lines.device, lines.dtype, self.quick, build,
            effort=timing.QUICK if self.quick else EFFORT,
            checked_at={} if checking else self.checked_at,
            profiled_ms=0.0,
        )  # fmt: skip
        for note in part.notes:
            self.report.note(note)
        self.report.failures += part.failures
        lines.rows += part.rows
        lines.ours |= {name for name, impl in built.items() if impl.ours}
        self.checked_at |= {row["impl"]: work.name for row in part.rows if row["checked"] is True}
        self.checking_s.update(seconds)
        for name, impl in built.items():
            times = [row["median_ms"] for row in part.rows if row["impl"] == name]
            slowest = max((ms for ms in times if ms is not None), default=0.0)
            reason = None
            if len(times) < len(PASSES) or None in times:
                self.ended.add(name)  # it failed or was wrong, which the report says
            elif slowest > LIMIT_MS:
                reason = f"a call takes {slowest / 1e3:.1f} s"
            elif not impl.ours and self.checking_s[name] > CHECKING_S:
                reason = f"to compile and check it has taken {self.checking_s[name]:.0f} s so far"
            if reason is not None:
                self.ended.add(name)
                if not last:
                    self.report.note(f"{spec.name} {lines.sweep.name}: {name} ends at {work.name}: {reason}")


def show(measured: Sequence[Lines]) -> None:
    """Prints a table of each sweep and pass: a line a row, a value a column."""
    for lines in measured:
        names = lines.names()
        for pass_ in PASSES:
            points = {name: lines.points(name, pass_) for name in names}
            values = [value for value in lines.sweep.sizes if any(value in line for line in points.values())]
            columns = ("median ms at", *map(str, values))
            rows = [
                [name, *(report.milliseconds(line[v]) if v in line else "" for v in values)]
                for name, line in points.items()
            ]
            console.table(f"{lines.title}, {lines.device}, {pass_}", columns, rows, right=columns[1:])


def plot(measured: Sequence[Lines], folder: Path, environment: dict[str, Any]) -> list[Path]:
    """One figure a sweep: a panel for each pass, above those of the op, below those of whole layers."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for lines in measured:
        names = lines.names()
        groups = list(dict.fromkeys(report.group(name) for name in names))
        if not groups:
            continue
        figure = Figure(figsize=(6 * len(PASSES) + 2, 4 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), len(PASSES), squeeze=False, sharex=True, sharey="row")
        for group, row in zip(groups, panels, strict=True):
            for pass_, axis in zip(PASSES, row, strict=True):
                # A colour keeps its line in both panels.
                for i, name in enumerate(n for n in names if report.group(n) == group):
                    line = lines.points(name, pass_)
                    own = name in lines.ours
                    axis.plot(
                        list(line), list(line.values()), "o-" if own else ".--", color=f"C{i % 10}",
                        linewidth=2.0 if own else 1.2, markersize=4, label=name,
                    )  # fmt: skip
                axis.set_title(pass_ if group == "" else f"{group}, {pass_}")
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                ticks = list(lines.sweep.sizes)[::2]
                axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
                axis.grid(alpha=0.3)
            row[0].set_ylabel("median time (ms)")
            row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        for axis in panels[-1]:
            axis.set_xlabel(lines.sweep.over)
        figure.suptitle(
            f"{lines.title}, {report.device_name(environment, lines.device)} (solid: this package; dashed: others)"
        )
        dtype = str(lines.dtype).removeprefix("torch.")
        paths.append(folder / f"{lines.spec.name}-{lines.sweep.name}-{lines.device}-{dtype}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths
