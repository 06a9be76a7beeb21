"""Build of the C++ extension and the CUDA library; everything else stands in pyproject.toml.

``PELT_FAST_BUILD`` chooses what is built:

* ``auto`` (default): what the machine allows. What had to be left out is printed (``pip install
  -v`` shows it), and recorded for ``python -m pelt_fast info``.
* ``none``: pure Python.
* ``cpu``, ``cuda``: exactly this (``cuda`` is both), or the build fails with the reason.

``csrc/cuda`` becomes a library of its own, ``pelt_fast/_cuda.so``, which ``torch.ops.load_library``
loads. It knows torch's stable ABI alone, so nvcc and the runtime's headers are enough to build it;
``cuda`` builds it against a torch without CUDA too, ``auto`` does not. It holds machine code for
``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0+PTX"), by default for what ``CUDA_ARCHITECTURES`` below says.

Sources are found by pattern: a new ``csrc/cpu/*.cpp`` or ``csrc/cuda/*.cu`` needs no change here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")

# -fopenmp is for the compiler alone, never for the linker: at::parallel_for is an inline
# "omp parallel", and its calls must bind to the OpenMP runtime that libtorch has loaded, not to a
# second one with a second pool of threads.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # gcc's own avx512fintrin.h
]
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = ("80", "90", "100")  # and PTX of the last, for whatever comes after
TORCH_FOR_CUDA = (2, 13)  # the first whose stable ABI hands out the native stream


class Plan:
    """What is built, what is left out and why."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise SystemExit(f"PELT_FAST_BUILD: got {mode!r}, expected one of {', '.join(MODES)}")
        self.mode = mode
        self.built: list[str] = []
        self.left_out: dict[str, str] = {}
        self.torch_version: str | None = None
        for part, missing in (("cpu", missing_for_cpu), ("cuda", missing_for_cuda)):
            if mode == "none":
                self.left_out[part] = "PELT_FAST_BUILD=none"
            elif mode == "cpu" and part == "cuda":
                self.left_out[part] = "PELT_FAST_BUILD=cpu"
            elif reason := missing(mode):
                self.leave_out(part, reason)
            else:
                self.built.append(part)
        if "cpu" in self.left_out and "cuda" in self.built:  # it needs the same compiler
            self.leave_out("cuda", "the C++ part cannot be built")

    def leave_out(self, part: str, reason: str) -> None:
        """Drops a part, or fails if it was asked for by name."""
        if self.mode == "cuda" or self.mode == part:
            raise SystemExit(f"PELT_FAST_BUILD={self.mode} cannot be built: {reason}")
        if part in self.built:
            self.built.remove(part)
        self.left_out[part] = reason

    def report(self, folder: Path) -> None:
        """Says what came out of the build, and records it for ``python -m pelt_fast info``."""
        built = ", ".join(self.built) or "pure Python"
        print(f"pelt_fast: built {built} (PELT_FAST_BUILD={self.mode})")
        for part, reason in self.left_out.items():
            print(f"pelt_fast: left out {part}: {reason}")
        sys.stdout.flush()
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "mode": self.mode,
            "built": self.built,
            "left_out": self.left_out,
            "torch": self.torch_version,
        }
        (folder / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")


def sources(part: str) -> list[str]:
    """Source files of one part, relative to the root as setuptools wants them."""
    patterns = {
        "cpu": ("csrc/*.cpp", "csrc/cpu/*.cpp"),
        "cuda": ("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
    }
    found = (path for pattern in patterns[part] for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def missing_for_cpu(mode: str) -> str | None:
    """Why the C++ part cannot be built here, or None."""
    if not sources("cpu"):
        return "no sources under csrc/"
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "no torch in the build environment; install torch, then this package with "
            "pip install --no-build-isolation"
        )
    if os.name != "posix":
        return "only POSIX compilers (gcc, clang) are supported"
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        return f"no C++ compiler: {compiler[0]} is not on PATH (set CXX to name another)"
    # The usual gaps of a fresh machine: no Python headers, no C++20, no OpenMP.
    probe = "#include <Python.h>\n#include <omp.h>\n#include <span>\nint main() { return 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(probe)
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [*compiler, *CXX_FLAGS, include, "-c", "probe.cpp", "-o", "probe.o"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        error = next((line for line in lines if "error" in line), lines[-1])
        return f"{compiler[0]} cannot compile a C++20, OpenMP, Python.h probe: {error}"
    return None


def missing_for_cuda(mode: str) -> str | None:
    """Why the CUDA part cannot be built here, or None; the toolkit decides, not a visible GPU."""
    if not sources("cuda"):
        return "no sources under csrc/cuda"
    try:
        import torch
    except ImportError:
        return "no torch in the build environment"
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_FOR_CUDA:
        oldest = ".".join(map(str, TORCH_FOR_CUDA))
        return f"torch {torch.__version__} is older than {oldest}, whose stable ABI it needs"
    if torch.version.cuda is None and mode == "auto":
        return f"torch {torch.__version__} was built without CUDA"
    if os.name != "posix":
        return "only POSIX compilers (gcc, clang) are supported"
    if not (path := nvcc()):
        home = os.environ.get("CUDA_HOME")
        where = f"{home}/bin, where CUDA_HOME points" if home else "on PATH (set CUDA_HOME)"
        return f"no CUDA toolkit: nvcc is not {where}"
    release = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    major = re.search(r"release (\d+)", release)
    if torch.version.cuda and major and major.group(1) != torch.version.cuda.split(".")[0]:
        return f"{path} is of CUDA {major.group(1)}, torch was built with {torch.version.cuda}"
    probe = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(probe + "int main() { return 0; }\n")
        command = [path, "-std=c++20", "--cudart=shared", "probe.cu", "-o", "probe"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines() or ["no message"]
        error = next((line for line in lines if "error" in line), lines[-1])
        return f"{path} cannot build a program with cuda_runtime.h: {error}"
    return None


def nvcc() -> str | None:
    """The CUDA compiler: that of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def architecture_flags(compiler: str) -> list[str]:
    """What code the library holds: machine code for each architecture, PTX where it is asked for."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked:
        numbers = [arch.partition("+")[0].replace(".", "") for arch in asked]
        ptx = [n for n, arch in zip(numbers, asked, strict=True) if arch.upper().endswith("+PTX")]
    else:
        result = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True)
        known = result.stdout.split()
        numbers = [n for n in CUDA_ARCHITECTURES if f"sm_{n}" in known]
        ptx = numbers[-1:]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return flags + [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx]


def build_cuda(folder: Path) -> None:
    """Compiles csrc/cuda to ``_cuda.so`` in the folder, unless what is there is newer than it."""
    import torch

    library = folder / "_cuda.so"
    read = [Path(__file__), *ROOT.glob("csrc/cuda/*")]
    if library.exists() and library.stat().st_mtime > max(p.stat().st_mtime for p in read):
        return
    compiler, installed = nvcc(), Path(torch.__file__).parent
    assert compiler is not None  # missing_for_cuda found one
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, *NVCC_FLAGS, *architecture_flags(compiler)]
    command += ["-shared", "--cudart=shared", f"-I{installed / 'include'}", f"-I{ROOT / 'csrc'}"]
    command += [*sources("cuda"), f"-L{installed / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    print(" ".join(command), flush=True)
    result = subprocess.run(command, cwd=ROOT)
    if result.returncode:
        library.unlink(missing_ok=True)
        raise RuntimeError(f"nvcc returned {result.returncode}")


def package_folder(command) -> Path:
    """Where the package's files go: the source tree when editable or in place, else the build's."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return ROOT / "pelt_fast" if in_place else Path(command.build_lib, "pelt_fast")


class BuildPy(build_py):
    """Copies the Python files and leaves the record of the build beside them."""

    def run(self) -> None:
        super().run()
        plan.report(package_folder(self))


plan = Plan(os.environ.get("PELT_FAST_BUILD", "auto").strip().lower() or "auto")
extensions: list[Extension] = []
build_ext_base = build_ext

if plan.built:
    import torch

    plan.torch_version = torch.__version__

if "cpu" in plan.built:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        name="pelt_fast._C",
        sources=sources("cpu"),
        include_dirs=[str(ROOT / "csrc")],
        depends=[path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h")],
        extra_compile_args={"cxx": CXX_FLAGS},
        optional=plan.mode == "auto",
    )
    extensions.append(extension)
    build_ext_base = BuildExtension


class BuildExt(build_ext_base):
    """Builds the extension; in auto mode one that does not compile is left out."""

    def run(self) -> None:
        steps = {"cpu": super().run, "cuda": lambda: build_cuda(package_folder(self))}
        for part in list(plan.built):
            try:
                steps[part]()
            except Exception as error:
                plan.leave_out(part, f"compilation failed: {str(error).splitlines()[0]}")
        plan.report(package_folder(self))


setup(ext_modules=extensions, cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
