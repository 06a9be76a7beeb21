"""docs/mixed_batches.md: its snippet runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pelt_fast import mixed_batch

pytest.importorskip("adapters")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mixed_batches.md"
TEXT = DOCUMENT.read_text()


def test_snippets_run():
    pytest.importorskip("peft")
    snippets = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, DOCUMENT.name, "exec"), namespace)
    for model, names in (("model", ("lora", "a", "b", "both")), ("users", ("french", "legal"))):
        trained = {n for n, p in namespace[model].named_parameters() if p.grad is not None}
        assert all(any(f".{name}." in key for key in trained) for name in names)
    assert namespace["text"].shape == (3, 14)


def test_models_are_those_of_the_code():
    from pelt_fast.integrations.adapters_mixed_prefix import MODELS

    table = TEXT[TEXT.index("| model |") : TEXT.index("`model.generate`")].lower()
    assert all(kind in table.replace("-", "") for kind in (m.replace("-", "") for m in MODELS))
    assert mixed_batch.__doc__ is not None
