"""docs/serving.md runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def test_snippets_run():
    """One after another in one namespace, as a reader would paste them."""
    text = DOCUMENT.read_text()
    found = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) >= 4
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(found):
        exec(compile(snippet, f"{DOCUMENT.name}, snippet {number}", "exec"), namespace)
    assert namespace["logits"].shape == (1, 12, 64)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", DOCUMENT.read_text())
    assert all(t.startswith("http") or (DOCUMENT.parent / t).exists() for t in targets)
