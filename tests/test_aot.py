"""The Triton kernels compiled without a GPU: that every architecture takes them, in how many registers, and how often.

An op takes part by what its triton.py declares: aot_variants and aot_same (see recattn_kernels/triton_launch.py). Every
variant of the selection is compiled, for one architecture; with --aot-full all variants are, for all architectures.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import INTERPRETING

from recattn_kernels import backends, registry

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETING, reason="Triton is not installed, or interprets its kernels"
)
# backend, architecture, lanes of a warp, registers there for each in a launch's budget, which is meant for NVIDIA's
TARGETS = {
    "sm_80": ("cuda", 80, 32, 1.0),
    "sm_90": ("cuda", 90, 32, 1.0),
    "sm_100": ("cuda", 100, 32, 1.0),
    "gfx942": ("hip", "gfx942", 64, 1.5),
}
TRITON_OPS = [spec.name for spec in registry.OPS if "triton" in spec.backends]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--aot-full")
    cases: dict[str, list[Any]] = {}
    for target, (_, _, lanes, _) in TARGETS.items():
        for op in TRITON_OPS if HAS_TRITON and not INTERPRETING else ():
            for variant in backends.load(op, "triton").aot_variants(lanes, full):
                name = f"{op}-{variant.name}"
                cases.setdefault(name, []).append(pytest.param(target, variant, id=f"{target}-{name}"))
    if not full:  # each for one of them, whichever others there are
        cases = {name: [same[zlib.crc32(name.encode()) % len(same)]] for name, same in cases.items()}
    metafunc.parametrize("target, variant", [case for same in cases.values() for case in same])


def resources(target: str, compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers a thread, and what was spilled: bytes of stack on NVIDIA, vector registers on AMD."""
    import triton

    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count")]
    else:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [cuobjdump, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    registers, spilled = (int(match[1]) for match in found if match is not None)
    return registers, spilled


@pytest.fixture
def none_returned_beside_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error, as it is to Triton 3.6: later ones allow a function to return a tuple with None in it."""
    from triton.compiler.code_generator import CodeGenerator
    from triton.language import core

    def has_none(value: Any) -> bool:
        return isinstance(value, core.tuple) and any(
            v is None or (isinstance(v, core.constexpr) and v.value is None) or has_none(v) for v in value
        )

    def checked(generator: Any, node: Any) -> None:
        visit(generator, node)
        assert not has_none(generator.return_vals[-1])

    visit = CodeGenerator.visit_Return
    if hasattr(CodeGenerator, "decide_return_type"):  # else Triton itself says so
        monkeypatch.setattr(CodeGenerator, "visit_Return", checked)


@needs_compiler
@pytest.mark.usefixtures("none_returned_beside_values")
def test_triton_compiles_within_its_budget(target: str, variant: Any, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    backend, architecture, lanes, share = TARGETS[target]
    compiled = variant.launch.compile(GPUTarget(backend, architecture, lanes))
    registers, spilled = resources(target, compiled, tmp_path)
    # A gather that Triton has given a layout of its own drags what it reads, and all that follows, through memory.
    assert "efficient_layout" not in compiled.asm["ttgir"]
    assert spilled == 0
    assert registers <= variant.launch.registers * share
    assert compiled.metadata.shared <= variant.shared


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_triton_does_not_recompile(op: str, target: str) -> None:
    from triton.backends.compiler import GPUTarget

    backend, architecture, lanes, _ = TARGETS[target]
    for calls in backends.load(op, "triton").aot_same(lanes):
        for launches in zip(*calls, strict=True):
            keys = [launch.specialisation(GPUTarget(backend, architecture, lanes)) for launch in launches]
            assert all(key == keys[0] for key in keys)
