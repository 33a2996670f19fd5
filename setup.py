"""Builds csrc/cpu into recattn_kernels._cpu and csrc/cuda into recattn_kernels._cuda, with ninja.

csrc includes no torch header: torch is never imported here and need not be there, and one build serves every version.
An extension that cannot be built is left out, and recattn_kernels/_build_info.py says why.

RECATTN_BUILD_CUDA: auto (default, build _cuda where nvcc is found), 0 (leave it out), 1 (not building it is an error).
RECATTN_CUDA_ARCHS: compute capabilities such as "80;86;90+PTX"; default: those of the visible GPUs, else 90.
CXX, CXXFLAGS, LDFLAGS, CUDA_HOME and MAX_JOBS have their usual meaning.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.errors import CompileError, OptionError

PACKAGE = "recattn_kernels"
CPU_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra"
)
CUDA_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -lineinfo --threads 4 -Xcompiler -fPIC,-fvisibility=hidden"
# The CUDA runtime is linked in and its symbols are kept private, so that it never meets torch's own copy.
CUDA_LINK_FLAGS = "-shared -cudart static -Xlinker --exclude-libs=ALL"
# Each kernel source is compiled once per instruction set, into a namespace of that name; one is picked at run time.
ISAS = {
    "isa_base": "-march=x86-64",
    "isa_v3": "-march=x86-64-v3",
    "isa_v4": "-march=x86-64-v4 -mprefer-vector-width=512",
}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"isa_base": ""}
NINJA_RULES = """
rule compile
  command = $run -MD -MF $out.d -c $in -o $out # $digest
  deps = gcc
  depfile = $out.d
  description = compile $out
rule link
  command = $run -o $out $in $libs
  description = link $out
"""


class NotBuiltError(Exception):
    """An extension is left out; the message is the line that the user reads about it."""


def find_compiler() -> list[str]:
    # A CXX that names nothing is reported: taking another compiler instead would go behind the user's back.
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, names):
        if command and shutil.which(command[0]):
            return command
    raise NotBuiltError(f"no C++ compiler ({', '.join(names)}) was found when the package was installed")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(places)):
        return nvcc
    raise NotBuiltError("nvcc was not found when the package was installed")


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    if path := shutil.which("ninja"):
        return path
    raise NotBuiltError("ninja was not found when the package was installed")


def binding_includes() -> list[str]:
    python = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(python, "Python.h")):
        raise NotBuiltError("Python.h was not found when the package was installed (Debian: apt install python3-dev)")
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return [f"-I{python}", f"-I{pybind11.get_include()}"]
    # torch ships pybind11's headers, and looking for its folder does not import it.
    torch = importlib.util.find_spec("torch")
    headers = os.path.join(os.path.dirname(torch.origin), "include") if torch and torch.origin else ""
    if not os.path.exists(os.path.join(headers, "pybind11", "pybind11.h")):
        raise NotBuiltError("pybind11 was not found when the package was installed")
    return [f"-I{python}", f"-I{headers}"]


def openmp_flags(compiler: list[str]) -> list[str]:
    """["-fopenmp"] where the compiler, its headers and its linker have OpenMP (Apple's clang has not), else []."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(probe), "-o", str(probe.with_suffix(""))]
        return ["-fopenmp"] if subprocess.run(command, capture_output=True).returncode == 0 else []


def gencode_flags() -> list[str]:
    archs = os.environ.get("RECATTN_CUDA_ARCHS", "")
    if not archs:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            answer = ""
        archs = ";".join(sorted(set(re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)))) or "90"
    flags = []
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d{2,}[af]?)(\+PTX)?", arch.strip().replace(".", ""))
        if match is None:
            raise OptionError(f'RECATTN_CUDA_ARCHS must be like "80;86;90+PTX", got "{archs}"')
        for code in ("sm", "compute") if match[2] else ("sm",):
            flags += ["-gencode", f"arch=compute_{match[1]},code={code}_{match[1]}"]
    return flags


def link_flags() -> list[str]:
    return shlex.split(os.environ.get("LDFLAGS", ""))


def for_nvcc(flags: list[str]) -> list[str]:
    """LDFLAGS, written for a compiler that links, as nvcc takes them: it refuses -Wl, and knows few of the others."""
    words, result = iter(flags), list[str]()
    for word in words:
        if word.startswith("-Wl,"):
            result += ["-Xlinker", word.removeprefix("-Wl,")]
        elif word in ("-L", "-l", "-Xlinker"):
            result += [word, *(value for value in [next(words, None)] if value)]
        elif word[:2] in ("-L", "-l") or Path(word).suffix in (".a", ".o", ".so"):
            result.append(word)
        else:
            result += ["-Xcompiler", word.replace(",", r"\,")]
    return result


def included(source: Path, found: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """A source and what it includes from csrc, at any depth."""
    found += (source,)
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
        places = (source.parent / name, Path("csrc", name))
        header = next((path.resolve() for path in places if path.exists()), None)
        if header is not None and header not in found:
            found = included(header, found)
    return found


class NinjaFile:
    """The compilations and the one link of an extension; everything they write lies in folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects = folder, []
        self.lines = [f"builddir = {folder}{NINJA_RULES}"]

    @staticmethod
    def shell(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def compile(self, source: Path, variant: str, command: list[str]) -> None:
        # The digest is part of the command, so that sources unpacked with older dates than the objects' are compiled.
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in included(source))).hexdigest()
        self.objects.append(str(self.folder / f"{source.name}.{variant}.o"))
        self.lines.append(f"build {self.objects[-1]}: compile {source}")
        self.lines.append(f"  run = {self.shell(command)}\n  digest = {digest}")

    def link(self, command: list[str], flags: list[str]) -> Path:
        output = self.folder / "extension.so"
        self.lines.append(f"build {output}: link {' '.join(self.objects)}")
        self.lines.append(f"  run = {self.shell(command)}\n  libs = {self.shell(flags)}\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), *jobs, "-f", str(self.folder / "build.ninja")]).returncode != 0:
            raise NotBuiltError(f"compiling csrc/{self.folder.name} failed when the package was installed")
        return output


def build_cpu(ninja: NinjaFile) -> Path:
    compiler, includes = find_compiler(), binding_includes()
    openmp = openmp_flags(compiler)
    command = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), *CPU_FLAGS.split(), *openmp, "-Icsrc"]
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if source.name.startswith("bindings"):
            ninja.compile(source, "isa_base", [*command, *ISAS["isa_base"].split(), *includes])
        else:
            for isa, flags in ISAS.items():
                ninja.compile(source, isa, [*command, *flags.split(), f"-DRECATTN_ISA={isa}"])
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return ninja.link([*compiler, "-shared", *openmp, *undefined], link_flags())


def build_cuda(ninja: NinjaFile) -> Path:
    nvcc, compiler, includes = find_nvcc(), find_compiler(), binding_includes()
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 and "NVCC_CCBIN" not in os.environ else []
    archs = gencode_flags()
    command = [nvcc, *host, *CUDA_FLAGS.split(), *archs, "-Icsrc"]
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        ninja.compile(source, "cuda", command)
    for source in sorted(Path("csrc/cuda").glob("bindings*.cpp")):
        ninja.compile(source, "cuda", [*command, *includes])
    return ninja.link([nvcc, *host, *CUDA_LINK_FLAGS.split(), *archs], for_nvcc(link_flags()))


class build_ext(_build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # pip gives an editable build a throw-away folder: everything would compile every time
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def get_outputs(self) -> list[str]:
        package = Path("." if self.inplace else self.build_lib, PACKAGE)
        # In place, extensions for other Pythons may lie beside ours.
        suffix = sysconfig.get_config_var("EXT_SUFFIX") if self.inplace else ".so"
        return [str(path) for path in (*package.glob(f"*{suffix}"), *package.glob("_build_info.py"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {os.path.join(self.build_lib, path): path for path in self.get_outputs()} if self.inplace else {}

    def run(self) -> None:
        setting = os.environ.get("RECATTN_BUILD_CUDA", "auto")
        if setting not in ("auto", "0", "1"):
            raise OptionError(f'RECATTN_BUILD_CUDA must be auto, 0 or 1, got "{setting}"')
        for stale in self.get_outputs():  # what an earlier build left must not ship
            os.remove(stale)
        package = Path("." if self.inplace else self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        info = []
        # CUDA first: where it is required and cannot be built, say so before compiling anything else.
        for name, build in (("cuda", build_cuda), ("cpu", build_cpu)):
            reason = None
            try:
                if name == "cuda" and setting == "0":
                    raise NotBuiltError("RECATTN_BUILD_CUDA=0 was set when the package was installed")
                built = build(NinjaFile(Path(self.build_temp, name)))
                shutil.copy(built, package / os.path.basename(self.get_ext_filename(f"{PACKAGE}._{name}")))
            except NotBuiltError as error:
                if name == "cuda" and setting == "1":
                    raise CompileError(f"RECATTN_BUILD_CUDA=1, but {error}") from None
                reason = str(error)
                if name == "cpu" or setting == "auto":
                    print(f"WARNING: {PACKAGE}._{name} is left out: {reason}", file=sys.stderr, flush=True)
            info.insert(0, f"{name.upper()}: str | None = {reason!r}\n")
        docstring = '"""Written by setup.py: None where an extension was built, else why it was not."""\n\n'
        (package / "_build_info.py").write_text(docstring + "".join(info))


setup(
    ext_modules=[Extension(f"{PACKAGE}._cpu", []), Extension(f"{PACKAGE}._cuda", [])],
    cmdclass={"build_ext": build_ext},
)
