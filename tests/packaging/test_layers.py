"""Imports run one way only: each module's import statements are read and held to the layers."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pelt_fast"

# A module may import its own layer and the ones after it.
LAYERS = (
    "integrations",
    "serving",
    "checkpoints",
    "nn",
    "functional",
    "autograd",
    "ops",
    "dispatch",
    "backends",
    "kernels",
    "_C",
)
LEAVES = {
    "activations",
    "env",
    "phm",
    "random",
    "segments",
}  # anyone may import them, they import nothing of the package
ORACLE = "reference"  # imports torch alone; of the product only its backend may import it
FRONT = {"", "__main__"}  # pelt_fast/__init__.py and the command line
STANDARD = set(sys.stdlib_module_names)


def modules() -> list[Path]:
    return sorted(ROOT.glob(f"{PACKAGE}/**/*.py")) + sorted(ROOT.glob("kernels/**/*.py"))


def dotted(path: Path) -> list[str]:
    """pelt_fast/ops/lora.py -> [pelt_fast, ops, lora]; kernels/x.py -> [pelt_fast, kernels, x]."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts if parts[0] == PACKAGE else [PACKAGE, *parts]


def imports(path: Path, source: str) -> list[str]:
    """Absolute dotted names of all that a file imports, wherever in it the statement stands."""
    module = dotted(path)
    package = module[:-1]  # of pelt_fast/ops/__init__.py too: [pelt_fast, ops]
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base == [PACKAGE]:  # "from .. import functional" names a module or a re-export
                found += [f"{PACKAGE}.{alias.name}" for alias in node.names]
            else:
                found.append(".".join(base))
    return found


def violations(path: Path, source: str) -> list[str]:
    """The rules that a file's imports break."""
    module = dotted(path)
    here = module[1] if module[1:] != ["__init__"] else ""
    broken = []
    for name in imports(path, source):
        top, _, rest = name.partition(".")
        layer = rest.split(".")[0]
        if top != PACKAGE:
            allowed = {"reference": {"torch"}, "kernels": {"torch", "triton"}}.get(here)
            if allowed is not None and top not in allowed | STANDARD:
                broken.append(f"{here} imports {name}, it may import {', '.join(sorted(allowed))}")
        elif here in FRONT or here == layer:
            if layer == "testing" and here == "":
                broken.append("the package imports testing")
        elif here in LEAVES or here in (ORACLE, "kernels"):
            broken.append(f"{here} imports {name}, it may import nothing of the package")
        elif here == "testing" or layer in LEAVES or (here, layer) == ("backends", ORACLE):
            pass
        elif here not in LAYERS:
            broken.append(f"{here} is in no layer")
        elif layer not in LAYERS or LAYERS.index(layer) < LAYERS.index(here):
            broken.append(f"{here} imports {name}, which is not below it")
    return broken


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("pelt_fast/ops/lora.py", "from .. import functional"),
        ("pelt_fast/ops/lora.py", "from ..autograd.lora import LoRALinearFunction"),
        ("pelt_fast/dispatch/select.py", "import pelt_fast.ops"),
        ("pelt_fast/nn/lora.py", "def f():\n    from ..integrations import peft"),
        ("pelt_fast/functional/lora.py", "from ..testing import oracle"),
        ("pelt_fast/__init__.py", "from . import testing"),
        ("pelt_fast/functional/lora.py", "from ..reference import lora_linear"),
        ("pelt_fast/reference/lora.py", "import numpy"),
        ("pelt_fast/reference/lora.py", "from ..random import philox_mask"),
        ("pelt_fast/env.py", "from .dispatch import select"),
        ("pelt_fast/helpers/new.py", "from ..nn import LoRALinear"),
        ("kernels/lora/shrink.py", "import transformers"),
        ("kernels/lora/shrink.py", "from ...random import philox_mask"),
        ("kernels/lora/shrink.py", "from pelt_fast.dispatch import LoRAProblem"),
    ],
)
def test_the_reader_sees_what_is_forbidden(path: str, statement: str):
    assert violations(ROOT / path, statement)


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("pelt_fast/integrations/peft.py", "import peft\nfrom ..functional import lora_linear"),
        ("pelt_fast/backends/triton_/lora.py", "from ...kernels.lora import shrink"),
        ("pelt_fast/backends/cpp/__init__.py", "from ... import _C"),
        ("pelt_fast/backends/reference_/lora.py", "from ... import reference"),
        ("pelt_fast/ops/lora.py", "from ..env import env\nfrom .library import define"),
        ("kernels/lora/shrink.py", "import triton.language as tl\nfrom ..common import offsets"),
        ("pelt_fast/testing/oracle.py", "from .. import functional, reference"),
    ],
)
def test_the_reader_lets_pass_what_is_allowed(path: str, statement: str):
    assert violations(ROOT / path, statement) == []
