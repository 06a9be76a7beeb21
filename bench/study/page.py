"""The study's page in the documents: tables and picture between two marks, around them what people have written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..tables import TextTable

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"


def update(page: Path, tables: Sequence[TextTable], provenance: str, picture: Path) -> None:
    """Raises ``ValueError`` when the page has no marks."""
    text = page.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"{page} has no {BEGIN} before {END}")
    parts = [*(table.markdown() for table in tables)]
    if picture.exists():
        link = Path(os.path.relpath(picture, page.parent)).as_posix()
        parts.append(f"![Accuracy, time and memory of each method]({link})\n")
    parts.append(f"Costs: {provenance}\n")
    page.write_text(before + BEGIN + "\n" + "\n".join(parts) + END + after, encoding="utf-8")
