"""The tools that check the code are the same ones everywhere."""

from __future__ import annotations

import re
from pathlib import Path

PIN = r"\b([a-z-]+)==([0-9.]+[0-9])"


def test_pre_commit_uses_the_versions_of_the_dev_extra(root: Path):
    hooks = set(re.findall(PIN, (root / ".pre-commit-config.yaml").read_text()))
    assert {name for name, _ in hooks} == {"ruff", "clang-format", "codespell"}
    assert hooks <= set(re.findall(PIN, (root / "pyproject.toml").read_text()))
