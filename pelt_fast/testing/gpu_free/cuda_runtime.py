"""CUDA's runtime, as far as a launch needs it, with `ptx` in the place of a GPU.

A library of CUDA C++ is linked with a stand-in for ``libcudart``: its own host code runs, chooses kernels and grids and
fills parameters; each launch then runs the PTX of that kernel on CPU tensors.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ptx

_STAND_IN = r"""
#include <cstddef>
#include <map>
#include <string>

struct dim3 { unsigned x, y, z; };
using Hook = void (*)(const char*, const unsigned*, unsigned, size_t, void**);

namespace {
struct Configuration { dim3 grid, block; size_t shared; void* stream; } configuration;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
Hook hook = nullptr;
void* module = nullptr;
} // namespace

extern "C" {
__attribute__((visibility("default"))) void stand_in_hook(Hook h) { hook = h; }

void** __cudaRegisterFatBinary(void*) { return &module; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                     void*) {
  const unsigned sizes[3] = {grid.x, grid.y, grid.z};
  if (hook) hook(names()[kernel].c_str(), sizes, block.x * block.y * block.z, shared, arguments);
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                       void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error"; }
}
"""
_FLAGS = ("-std=c++20", "-Xcompiler=-fPIC")


def nvcc() -> str | None:
    """The CUDA compiler, where there is one."""
    return shutil.which("nvcc")


def command(*arguments: str) -> list[str]:
    """A command of the CUDA compiler."""
    return [nvcc() or "nvcc", *_FLAGS, *arguments]


class EmulatedLibrary:
    """A library of CUDA C++ whose launches run on CPU tensors.

    Args:
        sources: ``.cu`` files, whose kernels are compiled to PTX for sm_80, and ``.cpp`` files.
        folder: where the outputs go; what stands there already is taken as it is.
        flags: for the compiler.
    """

    def __init__(self, sources: Sequence[Path], folder: Path, flags: Sequence[str] = ()) -> None:
        library = folder / "emulated.so"
        kernels = [source for source in sources if source.suffix == ".cu"]
        if not library.exists():
            self._build(sources, kernels, folder, flags)
        self.entries: dict[str, ptx.Entry] = {}
        for source in kernels:
            self.entries |= ptx.parse((folder / source.with_suffix(".ptx").name).read_text())
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))

    @staticmethod
    def _build(
        sources: Sequence[Path], kernels: Sequence[Path], folder: Path, flags: Sequence[str]
    ) -> None:
        installed = Path(torch.__file__).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stand_in.cpp").write_text(_STAND_IN)
        # PTX for the emulator and none in the library: it would take an assembler's time
        include = f"-I{installed / 'include'}"
        code = "-gencode=arch=compute_80,code=compute_80"
        objects = []
        for source in (*sources, folder / "stand_in.cpp"):
            made = folder / f"{source.stem}.o"
            objects.append(str(made))
            keep = ["--keep", f"--keep-dir={folder}"] if source in kernels else []
            _run(command(code, *flags, include, *keep, "-c", str(source), "-o", str(made)))
        libraries = [f"-L{installed / 'lib'}", "-ltorch_cpu", "--cudart=none"]
        made = folder / "unfinished.so"
        _run(command("-shared", *objects, *libraries, "-o", str(made)))
        made.rename(folder / "emulated.so")

    @contextmanager
    def emulating(self, tensors: Iterable[Tensor]) -> Iterator[list[ptx.Launch]]:
        """Within the block, launches run, and may touch these tensors and nothing else."""
        memory, launches, faults = ptx.Memory(tensors), list[ptx.Launch](), list[Exception]()

        def launch(name: bytes, grid: Any, threads: int, shared: int, arguments: Any) -> None:
            if faults:
                return
            try:
                entry = self.entries[name.decode()]
                if threads != entry.threads:
                    raise ptx.Fault(f"{threads} threads, compiled for {entry.threads}")
                values = [
                    ctypes.string_at(arguments[i], size)
                    for i, (_, size) in enumerate(entry.parameters)
                ]
                launches.append(ptx.run(entry, tuple(grid[:3]), values, memory, shared))
            except Exception as fault:  # it must not pass through C++
                faults.append(fault)

        hook = _HOOK(launch)
        self._library.stand_in_hook(hook)
        try:
            yield launches
        finally:
            self._library.stand_in_hook(None)
        if faults:
            raise faults[0]


_HOOK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def _run(what: list[str]) -> None:
    result = subprocess.run(what, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(what)}:\n{result.stdout}{result.stderr}")
