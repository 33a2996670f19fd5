"""What every test runs under: seeded, deterministic, and with uninitialised memory filled with NaN."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from typing import Any

# Before anything imports distutils, as compiling with Triton does: setuptools, which torch's Inductor needs later,
# refuses to be imported after it.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

# torch keeps compiled backwards on disk, and does not see that an op's own have changed since.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch
from emulation import cuda_on_the_cpu, emulated  # noqa: F401  (fixtures)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--aot-full", action="store_true", help="every GPU kernel for every architecture, not a selection")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_interpreter = pytest.mark.skip(
        reason="Triton reads TRITON_INTERPRET when it is imported: TRITON_INTERPRET=1 pytest -m interpret"
    )
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "interpret" in item.keywords and not INTERPRETING:
            item.add_marker(no_interpreter)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    items.sort(key=lambda item: "slow" not in item.keywords)  # so that several processes end at about the same time


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> None:
    """Triton's interpreter puts its own functions into triton.language for a launch, and looks for what to replace once
    more in every call of a function by a kernel, where all is replaced: nearly half of the time of these tests."""
    if not INTERPRETING or importlib.util.find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    def patch(function: Any) -> Any:
        modules = [m for m in function.__globals__.values() if inspect.ismodule(m) and m in (language, language.core)]
        if modules and not any(language.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch_language(function)

    patch_language = interpreter._patch_lang
    if hasattr(interpreter, "_LangPatchScope"):  # not in each Triton
        interpreter._patch_lang = patch


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """torch.empty returns NaN in torch's deterministic mode, so a kernel that misses an element is seen."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def absorbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SlotAttention absorbs its projections as if calls took no time: of the sizes in tests few would be enough."""
    monkeypatch.setattr("recattn_kernels.layers.slot_attention_inputs.ABSORBED_CALLS", 0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile with nothing left of earlier compilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
