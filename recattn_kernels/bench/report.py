"""Results as tables on the terminal, JSON, bar charts, and the generated sections of README.md and of the results' own.

python -m recattn_kernels.bench.report        writes those sections anew
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recattn_kernels import registry
from recattn_kernels.bench import console, peers
from recattn_kernels.bench.runner import Report, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# Where each backend runs; the package decides this in backends.machine_refusal.
PLACES = {"reference": "CPU, GPU", "cpp": "CPU", "triton": "GPU", "cuda": "GPU"}


def group(impl: str) -> str:
    """Rows are compared within a group: what a name has before its colon, as "layer:"; the op's own have none."""
    return impl.partition(":")[0] if ":" in impl else ""


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row that this one is compared with: the first of its group, which is the fused backend that auto takes."""
    keys = ("op", "workload", "device", "dtype", "pass")
    for other in rows:
        alike = all(other[key] == row[key] for key in keys)  # type: ignore[literal-required]
        if alike and group(other["impl"]) == group(row["impl"]) and other["median_ms"] is not None:
            return other
    return None


def workload_of(row: Row) -> tuple[str, str, str, str]:
    """What a table, or a chart, has the rows of."""
    return row["op"], row["workload"], row["device"], row["dtype"]


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    base = baseline(row, rows)
    if base is None or not row["median_ms"] or not base["median_ms"]:
        return ""
    return f"{row['median_ms'] / base['median_ms']:.2f}x"


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    median, p10, p90, peak = row["median_ms"], row["p10_ms"], row["p90_ms"], row["peak_bytes"]
    if median is None or p10 is None or p90 is None:
        return [row["pass"], row["impl"], "wrong", "", "", "", ""]
    return [
        row["pass"],
        row["impl"],
        milliseconds(median),
        "one run" if p10 == p90 else f"{milliseconds(p10)} to {milliseconds(p90)}",
        _ratio(row, rows),
        f"{row['bytes'] / median / 1e6:.1f}",
        "" if peak is None else f"{peak / 2**20:.1f}",
    ]


def show(report: Report) -> None:
    """Prints one table a workload, and what is to be known about the rows."""
    columns = ("pass", "row", "median ms", "10th to 90th percentile", "time ratio", "GB/s", "peak MiB")
    for key in dict.fromkeys(map(workload_of, report.rows)):
        op, workload, device, dtype = key
        rows = [r for r in report.rows if workload_of(r) == key]
        work = next((w for w in registry.find(op).workloads if w.name == workload), None)
        sizes = "" if work is None else ", ".join(f"{name} {n}" for name, n in work.sizes.items())
        title = f"{op} {workload}: {sizes}, {dtype}, {device}"
        console.table(title, columns, [_cells(r, rows) for r in rows], right=columns[2:])
    if report.rows:
        ratio = "time ratio: to the first row of the op, or of the layers"
        print(f"\n{ratio}. GB/s: the least that the pass must move / median.")
    names = {r["impl"] for r in (*report.rows, *report.sweeps)}
    for prefix, text in peers.NOTES.items():
        if any(name == prefix or (prefix[-1] in ":/" and name.startswith(prefix)) for name in names):
            print(f"{prefix.rstrip(':/')}: {text}" if prefix[-1] != "/" else f"{prefix}N: {text}")
    for line in report.notes:
        print(line)
    for line in report.failures:
        print(f"FAILED {line}")


def device_name(environment: dict[str, Any], device: str) -> str:
    return str(environment["gpus"][0]["name"]) if device == "cuda" and environment["gpus"] else str(environment["cpu"])


def slug(name: str) -> str:
    """AMD EPYC 9654 96-Core Processor -> amd-epyc-9654-96-core-processor"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_file(path: str, environment: dict[str, Any], device: str) -> Path:
    """Where results go: the file itself, or <device>.json in a folder, which is made.

    A folder is one that exists, a path that ends in a separator, and a new one that does not end in .json.
    """
    file = Path(path)
    folder = path.endswith(("/", os.sep)) or not (file.exists() or file.suffix == ".json")
    return file / f"{slug(device_name(environment, device))}.json" if folder or file.is_dir() else file


def try_writing(path: Path) -> None:
    """Raises OSError where a file could not be written; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.open("ab").close()
    else:
        tempfile.TemporaryFile(dir=path.parent).close()


def write_json(report: Report, path: Path) -> str:
    """Writes the results and says so. Rows of sweeps are apart, as no table has them.

    A file that has rows is left as it is where this run has none.
    """
    if not report.rows and _has_rows(path):
        return f"left {path} as it was: this run made no rows"
    result = {"environment": report.environment, "rows": report.rows}
    if report.sweeps:
        result["sweeps"] = report.sweeps
    path.write_text(json.dumps(result, indent=1) + "\n")
    return f"wrote {path}"


def _has_rows(path: Path) -> bool:
    try:
        return path.is_file() and bool(json.loads(path.read_text())["rows"])
    except (ValueError, KeyError, TypeError):
        return False  # no results


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One bar chart a workload: median times, a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key in dict.fromkeys(map(workload_of, rows)):
        op, workload, device, dtype = key
        timed = [r for r in rows if workload_of(r) == key and r["median_ms"] is not None]
        passes = list(dict.fromkeys(r["pass"] for r in timed))
        if not passes:
            continue
        figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), 3.5), squeeze=False, layout="constrained")
        for axis, name in zip(axes[0], passes, strict=True):
            bars = [r for r in timed if r["pass"] == name]
            # Time grows by factors from row to row: a logarithmic axis keeps the short bars visible.
            drawn = axis.barh([r["impl"] for r in bars], [r["median_ms"] for r in bars])
            axis.bar_label(drawn, [milliseconds(r["median_ms"] or 0.0) for r in bars], padding=3)
            axis.set(xscale="log", xlabel="median time (ms)", title=name)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        figure.suptitle(f"{op} {workload}, {dtype}, {device}")
        paths.append(folder / f"{'-'.join(key)}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


# Markdown


def load_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def support_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Op x backend, with dtypes. A GPU backend counts as run once there are results of it on a GPU."""
    names = [name for name in PLACES if any(name in spec.dtypes for spec in registry.OPS)]
    lines = ["| op | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- |" + " --- |" * len(names)]
    measured = {(r["op"], r["impl"]) for result in results for r in result["rows"] if r["device"] == "cuda"}
    short = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    for spec in registry.OPS:
        cells = []
        for name in names:
            if name != "reference" and name not in spec.backends:
                cells.append("")
                continue
            dtypes = " ".join(short[str(d).removeprefix("torch.")] for d in spec.dtypes[name])
            untried = PLACES[name] == "GPU" and (spec.name, name) not in measured
            cells.append(f"{PLACES[name]}: {dtypes}" + ("; compiled, not yet run" if untried else ""))
        lines.append(f"| `{spec.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measured_on(environment: dict[str, Any], device: str) -> str:
    threads = f", {environment['threads']} threads, {environment['capability']}" if device == "cpu" else ""
    date = environment["date"].split()[0]
    return f"{device_name(environment, device)}{threads}; torch {environment['torch']}; {date}."


Ratios = dict[tuple[str, ...], dict[str, list[float]]]


def _ratios(rows: Sequence[Row]) -> Ratios:
    """Of each pass, how many times as long others take, by op, dtype, the row that they are beside and their name."""
    ratios: Ratios = {}
    for row in rows:
        base = baseline(row, rows)
        if base is None or base is row or base["impl"] == "reference" or not row["median_ms"] or not base["median_ms"]:
            continue
        key = (row["op"], row["dtype"], base["impl"], row["impl"].partition("/")[0])
        ratios.setdefault(key, {}).setdefault(row["pass"], []).append(row["median_ms"] / base["median_ms"])
    return ratios


def summary_markdown(results: Sequence[dict[str, Any]]) -> str:
    """How many times as long the others take, over all workloads: a column for each pass on each machine."""
    machines, columns = [], []
    for result in results:
        for device in dict.fromkeys(r["device"] for r in result["rows"]):
            rows = [r for r in result["rows"] if r["device"] == device]
            machines.append(_measured_on(result["environment"], device))
            name, ratios = device_name(result["environment"], device), _ratios(rows)
            columns += [(f"{name}: {p}", p, ratios) for p in dict.fromkeys(r["pass"] for r in rows)]
    if not machines:
        return ""
    lines = ["| op | dtype | row | beside | " + " | ".join(title for title, _, _ in columns) + " | workloads |"]
    lines.append("| --- | --- | --- | --- |" + " ---: |" * (len(columns) + 1))
    for key in dict.fromkeys(key for _, _, ratios in columns for key in ratios):
        found = [ratios.get(key, {}).get(name, []) for _, name, ratios in columns]
        means = [f"{statistics.geometric_mean(v):.2f}x" if v else "" for v in found]
        op, dtype, base, impl = key
        lines.append(f"| {op} | {dtype} | `{base}` | `{impl}` | {' | '.join(means)} | {max(map(len, found))} |")
    return "\n\n".join([*machines, "\n".join(lines)])


def bench_markdown(results: Sequence[dict[str, Any]]) -> str:
    """The measured medians: one table a machine, for the ops, and one for the layers."""
    parts = []
    for result in results:
        env, rows = result["environment"], result["rows"]
        for device in dict.fromkeys(r["device"] for r in rows):
            parts.append(f"{_measured_on(env, device)} Median time in ms, in brackets the ratio to the first column.")
            for name in dict.fromkeys(group(r["impl"]) for r in rows):
                mine = [r for r in rows if r["device"] == device and group(r["impl"]) == name]
                # Ops whose rows are compared with the same one share a table.
                first = {
                    op: next(r["impl"] for r in mine if r["op"] == op) for op in dict.fromkeys(r["op"] for r in mine)
                }
                for impl in dict.fromkeys(first.values()):
                    parts.append(_pivot([r for r in mine if first[r["op"]] == impl]))
    return "\n\n".join(part for part in parts if part)


def _pivot(rows: Sequence[Row]) -> str:
    # compile and compile/28 share a column: both are what torch.compile gives.
    columns = list(dict.fromkeys(r["impl"].partition("/")[0] for r in rows))
    lines = ["| workload | pass | " + " | ".join(f"`{c}`" for c in columns) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(columns))
    for key in dict.fromkeys((r["op"], r["workload"], r["dtype"], r["pass"]) for r in rows):
        line = [r for r in rows if (r["op"], r["workload"], r["dtype"], r["pass"]) == key]
        cells = []
        for column in columns:
            row = next((r for r in line if r["impl"].partition("/")[0] == column), None)
            if row is None or row["median_ms"] is None:
                cells.append("" if row is None else "wrong")
                continue
            ratio = _ratio(row, line)
            cells.append(milliseconds(row["median_ms"]) + (f" ({ratio})" if column != columns[0] and ratio else ""))
        lines.append(f"| {key[0]} {key[1]}, {key[2]} | {key[3]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_section(text: str, name: str, body: str) -> str:
    """Puts body between <!-- name:begin --> and <!-- name:end -->, where text has them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        return text
    before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
    return f"{before}{begin}\n\n{body}\n\n{end}{after}" if body else f"{before}{begin}\n{end}{after}"


def generated(text: str, results: Sequence[dict[str, Any]]) -> str:
    """A Markdown file with its generated sections up to date."""
    for name, markdown in (("support", support_markdown), ("summary", summary_markdown), ("bench", bench_markdown)):
        text = replace_section(text, name, markdown(results))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="writes the generated sections of Markdown files anew")
    parser.add_argument("files", type=Path, nargs="*", default=[ROOT / "README.md", RESULTS / "README.md"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of <device>.json files")
    options = parser.parse_args()
    if missing := [str(file) for file in options.files if not file.is_file()]:
        parser.exit(2, f"report: no {', '.join(missing)}: give files, or run it in a checkout of the project\n")
    results = load_results(options.results)
    for file in options.files:
        file.write_text(generated(file.read_text(), results))


if __name__ == "__main__":
    main()
