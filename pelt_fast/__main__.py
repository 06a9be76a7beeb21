"""The command line: ``python -m pelt_fast info`` and ``python -m pelt_fast bench``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pelt_fast
from pelt_fast.dispatch import Explanation

PACKAGES = ("torch", "numpy", "triton", "transformers", "peft", "adapters")
ISA_FLAGS = {  # in /proc/cpuinfo
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
    "amx_fp16": "AMX FP16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}
TOKENS = (1, 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES, RANK = 768, 8
NO_BENCH = (
    "The benchmark lives in the repository, not in the installed package: clone it, then run\n"
    "`make bench` there, which sets up all that it needs."
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pelt_fast", description=pelt_fast.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, what was built, which backend serves what")
    bench_help = "run the benchmark of a repository checkout; further arguments go to it"
    commands.add_parser("bench", help=bench_help, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(info())
    return 0


def bench(arguments: list[str]) -> int:
    """Runs the ``bench`` folder beside the package, or says where there is one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        print(NO_BENCH, file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=root).returncode


def info() -> str:
    """Everything that decides which kernel runs, as text."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "build": _build(),
        "environment": _environment(),
        "backends": _backends(),
    }
    lines = [f"pelt_fast {pelt_fast.__version__}"]
    for title, content in sections.items():
        lines += ["", f"{title}:", *(f"  {line}" for line in content)]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} not installed"


def _devices() -> Iterator[str]:
    model, flags = _cpu()
    torch_isa = torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {model}, {torch.get_num_threads()} threads, torch runs its {torch_isa} kernels"
    yield f"cpu instruction sets: {', '.join(flags) or 'unknown'}"
    if not torch.cuda.is_available():
        yield "cuda: no device" if torch.version.cuda else "cuda: torch was built without it"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield f"cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB"


def _cpu() -> tuple[str, list[str]]:
    model, flags = platform.processor() or platform.machine(), set()
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    return model, [name for flag, name in ISA_FLAGS.items() if flag in flags]


def _build() -> Iterator[str]:
    path = Path(__file__).with_name("_build_info.json")
    if path.exists():
        record = json.loads(path.read_text())
        built = ", ".join(record["built"]) or "pure Python"
        against = f" against torch {record['torch']}" if record["torch"] else ""
        yield f"built: {built}{against} (PELT_FAST_BUILD={record['mode']})"
        for part, reason in record["left_out"].items():
            yield f"left out: {part}: {reason}"
    else:
        yield "not installed: run from a source tree that was never built"
    try:
        cpp = importlib.import_module("pelt_fast.backends.cpp")
        known = ", ".join(cpp.available_isas())
        yield f"extension: loads; instruction set in use: {cpp.isa()} (of {known})"
    except ImportError as error:
        yield f"extension: not loaded: {error}"


def _environment() -> Iterator[str]:
    names = sorted(name for name in os.environ if name.startswith("PELT_FAST_"))
    yield from (f"{name}={os.environ[name]}" for name in names)
    if not names:
        yield "no PELT_FAST_* variable is set"


def _backends() -> Iterator[str]:
    """The choice for sample calls of every operation, then each reason against a backend, once."""
    choices = [choice for explanation in _samples() for choice in explanation.choices]
    yield from (f"{choice.problem} -> {choice.chosen or 'none'}" for choice in choices)
    against = Counter(
        (name, reason)
        for choice in choices
        for name, reasons in choice.rejected.items()
        for reason in reasons
    )
    for choice in choices:  # a backend asked for by name that cannot run is not among the rejected
        if choice.asked not in ("auto", *choice.rejected):
            reasons = (choice.error or "").splitlines()[1:]
            against.update((choice.asked, reason.strip(" -")) for reason in reasons)
    for (name, reason), count in against.items():
        yield f"{name} rejected in {count} of {len(choices)}: {reason}"


def _samples() -> Iterator[Explanation]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device, dtype, tokens in itertools.product(devices, DTYPES, TOKENS):
        yield _lora_linear(device, dtype, tokens)


def _lora_linear(device: str, dtype: torch.dtype, tokens: int) -> Explanation:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype)

    x, weight = empty(tokens, FEATURES), empty(FEATURES, FEATURES)
    lora_a, lora_b = empty(RANK, FEATURES), empty(FEATURES, RANK)
    return pelt_fast.explain("lora_linear", x, weight, None, lora_a, lora_b, 2.0)


if __name__ == "__main__":
    sys.exit(main())
