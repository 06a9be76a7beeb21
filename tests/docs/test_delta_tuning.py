"""docs/delta_tuning.md: every method has its row, what the rows name exists, the snippets run."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
import torch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "delta_tuning.md"
TEXT = DOCUMENT.read_text()
# of the table in the survey that this project keeps, and of its issue
METHODS = (
    *("LoRA", "rsLoRA", "DoRA", "VeRA", "IA³", "Houlsby", "Pfeiffer", "Parallel adapters, MAM"),
    *("Prefix tuning", "Prompt tuning", "P-tuning", "UniPELT", "Compacter", "AdapterFusion"),
    *(
        "MAD-X",
        "AdapterDrop",
        "HyperFormer",
        "BitFit",
        "Diff pruning",
        "Masking",
        "Intrinsic subspace",
        "IPT",
    ),
    *("Side tuning", "Last-layer", "Selective tuning", "SHiRA", "MoE, X-LoRA", "Gradient-free"),
    *("Several deltas at once", "Several deltas in turn", "Many users in a batch"),
)


def rows() -> list[list[str]]:
    """The cells of every row but headings."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    return [[c.strip() for c in row] for row in cells if row[0].strip() != "method"]


def names(library: str) -> set[str]:
    """What a document calls ``library.something``, in code."""
    return set(re.findall(rf"`({library}(?:\.\w+)+)", TEXT))


def found(name: str) -> object:
    """The object of a dotted name; modules are imported on the way."""
    package, *path = name.split(".")

    def step(owner: object, part: str) -> object:
        try:
            return getattr(owner, part)
        except AttributeError:
            return importlib.import_module(f"{owner.__name__}.{part}")  # type: ignore[attr-defined]

    return reduce(step, path, importlib.import_module(package))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_one_row(method: str):
    assert len([row for row in rows() if re.match(rf"{re.escape(method)}(?!\w)", row[0])]) == 1


def test_rows_say_everything():
    assert len(rows()) >= len(METHODS)
    for row in rows():
        assert len(row) == 4, row[0]
        assert all(row), row[0]


@pytest.mark.parametrize("library", ["pelt_fast", "peft", "adapters"])
def test_what_is_named_exists(library: str):
    pytest.importorskip(library)
    assert len(names(library)) >= 8
    for name in sorted(names(library)):
        assert found(name) is not None, name


def test_a_name_that_does_not_exist_is_found_out():
    for name in ("pelt_fast.functional.lora_linea", "pelt_fast.nowhere"):
        with pytest.raises(ModuleNotFoundError):
            found(name)


def test_snippets_run():
    namespace: dict[str, torch.Tensor] = {}
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    exec(compile(snippet, DOCUMENT.name, "exec"), namespace)
    x, a, b = (namespace[name] for name in ("x", "vera_a", "vera_b"))
    vera = ((x @ a.T) * namespace["d"][:, 0] @ b.T) * namespace["b"][:, 0]
    torch.testing.assert_close(namespace["y"], x @ namespace["weight"].T + vera)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert all(t.startswith("http") or (DOCUMENT.parent / t).exists() for t in targets)
