"""What the documents say runs, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pelt_fast import env

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"))
    if not path.parent.name.startswith(".")
)


def snippets(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_snippets_run(path: Path):
    """One after another in one namespace, as a reader would paste them."""
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(snippets(path)):
        exec(compile(snippet, f"{path.name}, snippet {number}", "exec"), namespace)


def test_readme_has_snippets():
    assert len(snippets(ROOT / "README.md")) >= 2


def test_quick_start_is_short():
    code = [line for line in snippets(ROOT / "README.md")[0].splitlines() if line.strip()]
    imports = [line for line in code if line.startswith(("import ", "from "))]
    assert len(code) - len(imports) <= 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert not [target for target in local if not (path.parent / target).exists()]


def test_readme_lists_every_environment_variable():
    pattern = r"PELT_FAST_[A-Z_]+[A-Z]"
    known = set(re.findall(pattern, Path(env.__file__).read_text()))
    assert known == set(re.findall(rf"^\| `({pattern})`", (ROOT / "README.md").read_text(), re.M))


def test_make_targets_that_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)", path.read_text()))
        assert named <= targets, path
