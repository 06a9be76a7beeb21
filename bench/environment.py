"""Where and when numbers were made: a number without it is worth nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "peft", "adapters", "transformers", "triton", "pelt-fast")
BUSY_LOAD = 0.5
"""A load average above it at the start is said wherever results are shown."""


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit; of the CPU its threads, instruction set, and how busy it was."""
    name = device_name(device)
    meta: dict[str, Any] = {
        "device": name,
        "slug": slug(device),
        "kind": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
    }
    if hasattr(os, "getloadavg"):
        meta["load_average"] = round(os.getloadavg()[0], 2)
    return meta


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def instruction_set() -> str:
    """The widest that torch's CPU kernels use here."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "AMX" if has_amx() else torch.backends.cpu.get_cpu_capability()


def slug(device: torch.device) -> str:
    """A folder name: ``nvidia-h200``, ``amd-epyc-2c-avx2``."""
    if device.type == "cuda":
        return slugify(torch.cuda.get_device_name(device))
    return slugify(f"{_cpu_model()} {os.cpu_count()}c {instruction_set()}")


def slugify(text: str) -> str:
    text = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b|@.*?hz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def commit() -> str:
    """Short hash of HEAD, with ``+`` when the sources differ from it; empty outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        sources = ("pelt_fast", "csrc", "kernels", "bench/*.py")
        return head + ("+" if _git("status", "--porcelain", "--", *sources) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
