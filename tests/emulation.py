"""The CUDA kernels on a CPU: csrc/tests/emulation runs their sources as they are, every thread of every block, in a
random order. What a GPU does to them beyond that the tests marked cuda see.

`make test-cuda` has them built with AddressSanitizer, which sees what they read and write outside of tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from recattn_kernels import backends
from recattn_kernels.ops import gpu

CSRC = Path(__file__).parents[1] / "csrc"
# -Wno: g++ takes what it instruments in pybind11's headers for uninitialised.
SANITIZED = "ASAN_OPTIONS" in os.environ
SANITIZERS = ("-g1", "-fsanitize=address", "-Wno-maybe-uninitialized") if SANITIZED else ()
GPU = gpu.Gpu(multiprocessors=9, shared=100_000)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """recattn_kernels._cuda, of kernels that take pointers of the CPU."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("the emulation is compiled by g++ on Linux, with pybind11")
    import fcntl

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all processes
    folder = shared / "emulation"
    library = folder / "_cuda.so"
    with open(shared / "emulation.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            folder.mkdir()
            compile_emulation(compiler, folder, library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_emulation(compiler: str, folder: Path, library: Path) -> None:
    import pybind11

    includes = (CSRC / "tests/emulation", CSRC, sysconfig.get_path("include"), pybind11.get_include())
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    flags += ["-D__CUDA_ARCH__=900", *(f"-I{path}" for path in includes), *SANITIZERS]
    sources = (*sorted(CSRC.glob("cuda/*.cu")), CSRC / "tests/emulation/module.cpp")
    running = [
        subprocess.Popen([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.name}.o")])
        for source in sources
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    objects = map(str, folder.glob("*.o"))
    subprocess.run([compiler, "-shared", *SANITIZERS, *objects, "-o", str(library)], check=True)


@pytest.fixture
def cuda_on_the_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend cuda takes CPU tensors."""
    refusal = backends.machine_refusal
    monkeypatch.setattr(backends, "machine_refusal", lambda name, on: None if name == "cuda" else refusal(name, on))
    monkeypatch.setattr(gpu, "cuda", lambda: emulated)
    monkeypatch.setattr(gpu, "guard", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(gpu, "stream", lambda: 0)
    monkeypatch.setattr(gpu, "gpu_of", lambda device: GPU)
