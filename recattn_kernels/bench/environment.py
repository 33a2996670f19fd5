"""What a measurement was made on and with: for `recattn info`, and for every file of results."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import recattn_kernels
from recattn_kernels import backends
from recattn_kernels.spec import OpSpec, cast


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; where it has no number, as in many virtual machines, with its family and model."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if name := facts.get("model name"):
        family, model = facts.get("cpu family"), facts.get("model")
        numbered = any(c.isdigit() for c in name) or not (family and model)
        return name if numbered else f"{name} (family {family}, model {model})"
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def triton_version() -> str | None:
    return None if backends.triton_missing() else str(importlib.import_module("triton").__version__)


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside some other repository
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*") or None


def environment() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "recattn_kernels": recattn_kernels.__version__,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "cpu": cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": backends.cpu_capability(),
        "gpus": gpus(),
    }


def support(spec: OpSpec, backend: str) -> tuple[list[str], str | None]:
    """The devices that run a backend of an op on this machine; where there is none, the reason."""
    refusals = {
        device: backends.machine_refusal(backend, device) or _try(spec, backend, device)
        for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    }
    usable = [device for device, reason in refusals.items() if reason is None]
    if usable:
        return usable, None
    if backend == "cpp":
        return [], refusals["cpu"]
    return [], refusals.get("cuda") or backends.machine_refusal(backend, "cuda") or "torch finds no GPU"


def _try(spec: OpSpec, backend: str, device: str) -> str | None:
    """Runs the op's first sample: what a machine can run is known when it has run."""
    dtype = next((d for d in spec.dtypes[backend] if d == torch.float32), spec.dtypes[backend][0])
    args, kwargs = cast(spec.samples[0].make(torch.Generator().manual_seed(0)), dtype, device)
    try:
        with torch.no_grad():
            spec.function(*args, **kwargs, backend=backend)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"it fails: {error}"
    return None
