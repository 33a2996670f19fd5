"""Building and installing: what ships, what is left out and why, and that nothing stale or foreign gets in.

Tests of the real package take the checkout's object files along, so that little is compiled twice. Tests of setup.py's
own logic build a stand-in package, whose sources compile in a second.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
COMPILER = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++"))), None)
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def cannot_build() -> str | None:
    for name in ("pip", "setuptools", "pybind11", "ninja"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        return "building needs setuptools 77 or newer"
    return None if COMPILER else "building needs a C++ compiler"


needs_build = pytest.mark.skipif(cannot_build() is not None, reason=str(cannot_build()))


def run(*command: object, cwd: Path, expect: int | None = 0, **env: str) -> str:
    """Runs a command away from the caller's settings, checks its exit status and returns all that it printed."""
    hidden = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "TRITON_INTERPRET")
    kept = {key: value for key, value in os.environ.items() if key not in hidden and not key.startswith("RECATTN_")}
    kept |= {"RECATTN_BUILD_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if expect is not None:
        assert result.returncode == expect, f"exit status {result.returncode}\n{result.stdout}"
    return result.stdout


def build_in_place(tree: Path, expect: int = 0, **env: str) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, expect=expect, **env)


def build_wheel(tree: Path, *options: str, **env: str) -> Path:
    folder = tree / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", *options, "-w", folder, ".", cwd=tree, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target]
    run(*pip, wheel, cwd=target.parent)
    return target


def run_python(code: str, site: Path, tmp_path: Path, *, expect: int = 0) -> str:
    """Runs code with the packages of site in front of ours, from an empty folder.

    With -S, since an editable install of the checkout would lend the modules that the package in site lacks.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    others = [folder for folder in sys.path if folder and Path(folder) not in (ROOT, ROOT / "tests")]
    path = os.pathsep.join([str(site), *others])
    return run(sys.executable, "-S", "-c", code, cwd=elsewhere, expect=expect, PYTHONPATH=path)


def build_info(tree: Path) -> dict[str, str | None]:
    namespace: dict[str, str | None] = {}
    exec((tree / "recattn_kernels" / "_build_info.py").read_text(), namespace)
    return {name: namespace[name] for name in ("CPU", "CUDA")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project's sources in a folder of their own (with a space in its name), with the checkout's object files."""
    tree = tmp_path / "source tree"
    written = shutil.ignore_patterns(
        "*.so", "_build_info.py", "__pycache__", "lib*", "bdist*", "__editable__*", "csrc-tests"
    )
    for name in ("csrc", "recattn_kernels", "build"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, tree / name, ignore=written)
    for name in BUILD_FILES:
        shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A package of this name with next to no code, built by our setup.py; its _cpu.MARK comes from its sources."""
    tree = tmp_path / "stand in"
    for folder in ("recattn_kernels", "csrc/cpu"):
        (tree / folder).mkdir(parents=True)
    for name in BUILD_FILES:
        shutil.copy2(ROOT / name, tree / name)
    (tree / "recattn_kernels/__init__.py").write_text('__version__ = "1.0"\n')
    (tree / "csrc/cells.h").write_text('#ifndef MARK\n#define MARK "first"\n#endif\n')
    (tree / "csrc/cpu/op.cpp").write_text(
        '#include "cells.h"\nnamespace RECATTN_ISA {\nconst char* mark() { return MARK; }\n}\n'
    )
    (tree / "csrc/cpu/bindings.cpp").write_text(
        "#include <Python.h>\n"
        "namespace isa_base { const char* mark(); }\n"
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, {}, {}, {}, {}};\n'
        "PyMODINIT_FUNC PyInit__cpu() {\n"
        "  PyObject* m = PyModule_Create(&module);\n"
        '  PyModule_AddStringConstant(m, "MARK", isa_base::mark());\n'
        "  return m;\n"
        "}\n"
    )
    return tree


def mark(tree: Path, tmp_path: Path) -> str:
    return run_python("import recattn_kernels._cpu as m; print(m.MARK)", tree, tmp_path).strip()


# What an install must be able to do. It prints what was refused and why.
USE = """
import sys, torch, recattn_kernels
assert recattn_kernels.__file__.startswith(sys.path[1]), recattn_kernels.__file__
x = torch.randn(5, 3, 4, requires_grad=True)
u = torch.rand(4, requires_grad=True)
h, outputs = torch.zeros(3, 4), []
for x_t in x:
    h = torch.relu(x_t + u * h)
    outputs.append(h)
expected = torch.autograd.grad(torch.stack(outputs).square().sum(), (x, u))
for backend in (None, "reference"):
    output, h_n = recattn_kernels.indrnn(x, u, backend=backend)
    torch.testing.assert_close(output, torch.stack(outputs))
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), (x, u)), expected)
print(recattn_kernels.explain("indrnn", x, u))
"""
INFO = """
import runpy, sys
sys.argv = ["recattn", "info"]
runpy.run_module("recattn_kernels", run_name="__main__")
"""


@pytest.mark.slow
@needs_build
def test_isolated_install_from_sdist(source: Path, tmp_path: Path) -> None:
    """Whoever runs `pip install` on a release: its build environment holds no torch, and its sdist is all there is."""
    probe = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path / "probe", "ninja"]
    if "ERROR" in run(*probe, cwd=tmp_path, expect=None):
        pytest.skip("an isolated build environment needs a package index, and none is reachable from here")
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('.')", cwd=source)
    (sdist,) = source.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (tree,) = (tmp_path / "unpacked").iterdir()
    packed = {path.relative_to(tree).as_posix() for path in tree.rglob("*")}
    assert "csrc/cells.h" in packed and not any(name.endswith((".so", ".o", "_build_info.py")) for name in packed)
    if (source / "build").exists():
        shutil.copytree(source / "build", tree / "build")

    wheel = build_wheel(tree)
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"recattn_kernels/{name}" for name in (f"_cpu{SUFFIX}", "py.typed", "_build_info.py")} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"recattn_kernels"}, "only the package ships"
    site = install(wheel, tmp_path / "site")
    assert "'cpp': None" in run_python(USE, site, tmp_path)


@needs_build
def test_install_without_compilers(source: Path, tmp_path: Path) -> None:
    """A user with no C++ compiler and no nvcc: the install succeeds, the reference works, `info` says what is off."""
    empty = tmp_path / "empty"
    empty.mkdir()
    wheel = build_wheel(
        source, "--no-build-isolation", PATH=str(empty), CUDA_HOME=str(empty), RECATTN_BUILD_CUDA="auto"
    )
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    site = install(wheel, tmp_path / "site")
    reasons = build_info(site)
    assert "no C++ compiler (g++, c++, clang++) was found" in str(reasons["CPU"])
    assert "nvcc was not found" in str(reasons["CUDA"])
    assert "no C++ compiler" in run_python(USE, site, tmp_path)
    refused = run_python(USE + "recattn_kernels.indrnn(x, u, backend='cpp')", site, tmp_path, expect=1)
    assert re.search(r"BackendUnavailableError: indrnn: .*cpp.*no C\+\+ compiler", refused)
    assert "no C++ compiler" in " ".join(run_python(INFO, site, tmp_path).split())


@pytest.mark.parametrize("missing", [("triton",), ("typer", "rich", "matplotlib", "mlxtend")], ids=["triton", "extras"])
def test_without_optional_packages(missing: tuple[str, ...], tmp_path: Path) -> None:
    """A user whose torch came without Triton, or who installed no extras: the package works and `info` answers."""
    block = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    reasons = run_python(block + USE, ROOT, tmp_path)
    assert ("triton is not installed" in reasons) == ("triton" in missing)
    assert "indrnn" in run_python(block + INFO, ROOT, tmp_path)


def test_import_takes_what_it_needs(tmp_path: Path) -> None:
    """Everybody, each time: a CPU's call has no use for the compilers, which take longer to import than torch."""
    call = "x = torch.randn(3, 2, 4); recattn_kernels.GRU(4, 4)(x); recattn_kernels.indrnn(x, torch.ones(4))"
    look = "print(sorted({'torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'matplotlib'} & set(sys.modules)))"
    assert run_python(f"import sys, torch, recattn_kernels\n{call}\n{look}", ROOT, tmp_path).strip() == "[]"


@needs_build
def test_failed_build_ships_no_old_binary(stand_in: Path, tmp_path: Path) -> None:
    """Who upgrades in a checkout with a broken compiler: no kernels, never last version's kernels."""
    good = build_wheel(stand_in, "--no-build-isolation")
    assert f"recattn_kernels/_cpu{SUFFIX}" in zipfile.ZipFile(good).namelist()
    build_in_place(stand_in)
    leftover = next(stand_in.glob("build/lib*/recattn_kernels")) / "_older.so"
    leftover.write_bytes(b"an extension of an older version")
    assert mark(stand_in, tmp_path) == "first"
    other_python = stand_in / "recattn_kernels" / "_cpu.cpython-399-x86_64-linux-gnu.so"
    other_python.touch()

    bad = build_wheel(stand_in, "--no-build-isolation", CXX="false")
    assert not [name for name in zipfile.ZipFile(bad).namelist() if name.endswith(".so")]
    assert "compiling csrc/cpu failed" in str(build_info(install(bad, tmp_path / "site"))["CPU"])

    printed = build_in_place(stand_in, CXX="false")
    assert "WARNING: recattn_kernels._cpu is left out: compiling csrc/cpu failed" in printed
    assert list((stand_in / "recattn_kernels").glob("*.so")) == [other_python], "another Python's build is not ours"
    assert "compiling csrc/cpu failed" in str(build_info(stand_in)["CPU"])


@needs_build
def test_rebuilds_what_changed_and_nothing_else(stand_in: Path, tmp_path: Path) -> None:
    """Developers: an edited header or flag is in the next build, whatever its date; nothing else is compiled."""
    build_in_place(stand_in)
    assert mark(stand_in, tmp_path) == "first"
    assert "no work to do" in build_in_place(stand_in)
    header = stand_in / "csrc/cells.h"
    header.write_text(header.read_text().replace("first", "other"))
    os.utime(header, (1e9, 1e9))  # as a file that was unpacked from an archive
    build_in_place(stand_in)
    assert mark(stand_in, tmp_path) == "other"
    build_in_place(stand_in, CXXFLAGS="-DMARK='\"a $flag\"'")
    assert mark(stand_in, tmp_path) == "a $flag"


@needs_build
def test_editable_build_keeps_its_objects(stand_in: Path, tmp_path: Path) -> None:
    """Developers: `pip install -e .` puts the extension beside its sources and compiles nothing a second time."""
    build_in_place(stand_in)
    (stand_in / "recattn_kernels" / f"_cpu{SUFFIX}").unlink()
    printed = run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_editable('.')", cwd=stand_in)
    assert "no work to do" in printed
    assert mark(stand_in, tmp_path) == "first"
    assert build_info(stand_in)["CPU"] is None


@needs_build
def test_kernels_are_compiled_for_each_instruction_set(stand_in: Path) -> None:
    """Users of a wheel built elsewhere: every x86-64 gets its own kernels, and none is built for the builder's CPU."""
    build_in_place(stand_in)
    rules = next(stand_in.glob("build/temp*/cpu/build.ninja")).read_text()
    compiled = re.findall(r"build \S+/op\.cpp\.(\w+)\.o", rules)
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert compiled == (["isa_base", "isa_v3", "isa_v4"] if x86 else ["isa_base"])
    assert rules.count("-march=x86-64 ") == (2 if x86 else 0), "the bindings and one variant run on any x86-64"
    assert "-march=native" not in rules
    assert "-ffast-math" not in rules


@needs_build
def test_nvcc_gets_link_flags_that_it_knows(stand_in: Path) -> None:
    """Whoever builds in conda or for Debian, which set LDFLAGS for the host's compiler: nvcc refuses -Wl,."""
    nvcc = stand_in / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")  # what it is told is read in the ninja file
    nvcc.chmod(0o755)
    flags = "-Wl,-O1,-z,relro -Wl,--as-needed -L/a -L /b -pthread -fsanitize-recover=address,null"
    env = {"RECATTN_BUILD_CUDA": "auto", "RECATTN_CUDA_ARCHS": "90", "CUDA_HOME": str(nvcc.parents[1])}
    build_in_place(stand_in, LDFLAGS=flags, **env)
    libs = {
        name: re.findall(r"^  libs = (.*)$", next(stand_in.glob(f"build/temp*/{name}/build.ninja")).read_text(), re.M)
        for name in ("cpu", "cuda")
    }
    assert libs["cpu"] == [flags]
    given = "-Xlinker -O1,-z,relro -Xlinker --as-needed -L/a -L /b -Xcompiler -pthread"
    assert libs["cuda"] == [given + r" -Xcompiler '-fsanitize-recover=address\,null'"]


@needs_build
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler (/nonexistent/c++) was found"),
        ({"RECATTN_BUILD_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "RECATTN_BUILD_CUDA=1, but nvcc was not found"),
        ({"RECATTN_BUILD_CUDA": "yes"}, 'RECATTN_BUILD_CUDA must be auto, 0 or 1, got "yes"'),
    ],
    ids=["CXX", "no nvcc", "RECATTN_BUILD_CUDA"],
)
def test_settings_that_cannot_be_met(stand_in: Path, env: dict[str, str], message: str) -> None:
    """Whoever sets a variable for the build: it is obeyed or named in the output, never replaced by something else."""
    printed = build_in_place(stand_in, expect=0 if "CXX" in env else 1, **env)
    assert message in printed
    assert not list((stand_in / "recattn_kernels").glob("*.so"))


@needs_build
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_bad_cuda_archs(stand_in: Path) -> None:
    """Whoever mistypes RECATTN_CUDA_ARCHS: an error, also under auto, not a wheel without kernels."""
    printed = build_in_place(stand_in, expect=1, RECATTN_BUILD_CUDA="auto", RECATTN_CUDA_ARCHS="sm_90")
    assert 'RECATTN_CUDA_ARCHS must be like "80;86;90+PTX", got "sm_90"' in printed


@pytest.mark.slow
@needs_build
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda_extension_builds_without_a_gpu(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whoever builds for GPUs on a machine that has none, with any torch: _cuda holds code for each architecture, and
    nothing that belongs in registers is in memory. One build shows both, since it takes minutes."""
    build_in_place(source, RECATTN_BUILD_CUDA="1", RECATTN_CUDA_ARCHS="80;90+PTX")
    assert build_info(source) == {"CPU": None, "CUDA": None}
    extension = source / "recattn_kernels" / f"_cuda{SUFFIX}"
    for library in (b"libcudart.so", b"libtorch", b"libc10"):
        assert library not in extension.read_bytes(), "the CUDA runtime is linked in, and torch is not"
    # On its own, without the package: it must load with neither a GPU nor torch.
    load = f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(extension)!r}); "
    assert "indrnn" in run_python(
        load + "m = u.module_from_spec(s); s.loader.exec_module(m); print(dir(m))", source, tmp_path
    )

    triton = importlib.util.find_spec("triton")
    shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump") or (str(shipped) if shipped.is_file() else None)
    if cuobjdump is None:
        pytest.skip("built and imported; cuobjdump, which says what is in it, is not installed")
    listed = run(cuobjdump, "--list-elf", "--list-ptx", extension, cwd=tmp_path)
    assert set(re.findall(r"sm_\d+\.(?:cubin|ptx)", listed)) == {"sm_80.cubin", "sm_90.cubin", "sm_90.ptx"}
    usage = run(cuobjdump, "--dump-resource-usage", extension, cwd=tmp_path)
    for arch in ("80", "90") if request.config.getoption("--aot-full") else ("90",):
        # What was spilled, and what no register can be indexed for.
        code = re.findall(rf"^arch = sm_{arch}$(.*?)(?=^arch|\Z)", usage, re.MULTILINE | re.DOTALL)
        stacks = re.findall(r"STACK:(\d+)", "".join(code))
        assert len(stacks) > 0 and not any(map(int, stacks)), usage


@needs_build
def test_build_without_the_build_requirements(source: Path) -> None:
    """GPU machines without the pybind11 and ninja wheels: torch's headers and a ninja on PATH do, unimported."""
    block = (
        "import sys; sys.modules.update(pybind11=None, ninja=None); sys.argv = ['setup.py', 'build_ext', '--inplace']"
    )
    code = f"{block}; import runpy; runpy.run_path('setup.py', run_name='__main__')"
    scripts = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    printed = run(sys.executable, "-X", "importtime", "-c", code, cwd=source, PATH=scripts)
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", printed, re.MULTILINE))
    assert "setuptools" in imported
    assert "torch" not in imported
    assert build_info(source)["CPU"] is None, printed
    assert "torch/include" in next(source.glob("build/temp*/cpu/build.ninja")).read_text()


def test_sources_include_no_torch_header() -> None:
    """Who installs with another torch than we built with: no line of csrc depends on torch's ABI."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    pattern = re.compile(r"^\s*#\s*include\s*[<\"](\S+)[>\"]", re.MULTILINE)
    included = {name for path in sources for name in pattern.findall(path.read_text())}
    assert "pybind11/pybind11.h" in included
    assert not {name for name in included if name.split("/")[0] in ("torch", "ATen", "c10")}


def test_requirements() -> None:
    """Newcomers: torch is the only dependency, no build pulls it in, and every development requirement is pinned."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    requirement = pytest.importorskip("packaging.requirements").Requirement
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = pyproject["project"], pyproject["build-system"]["requires"]
    assert [requirement(line).name for line in project["dependencies"]] == ["torch"]
    assert {requirement(line).name for line in build} == {"setuptools", "pybind11", "ninja"}

    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements-dev.txt").read_text().splitlines()]
    pins = [requirement(line) for line in lines if line]
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in pins)
    wanted = [
        *project["dependencies"],
        *build,
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for want in map(requirement, wanted):
        versions = [next(iter(pin.specifier)).version for pin in pins if pin.name == want.name]
        assert versions or want.name == project["name"], f"{want.name} is not pinned"
        assert all(map(want.specifier.contains, versions)), f"{want} is pinned to {versions}"
