"""The kernels live in kernels/ and are imported as pelt_fast.kernels, through a symlink."""

from __future__ import annotations

import os
from pathlib import Path


def test_symlink_is_relative(root: Path):
    assert os.readlink(root / "pelt_fast" / "kernels") == os.path.join("..", "kernels")


def test_kernels_folder_is_no_package(root: Path):
    """An ``__init__.py`` there would shadow Hugging Face's ``kernels`` for whoever stands here."""
    assert not (root / "kernels" / "__init__.py").exists()


def test_installed_package_named_kernels_wins_in_the_root(root: Path, python, tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'hugging face'\n")
    program = (
        f"sys.path.insert(0, {str(root)!r})\n"
        "import kernels, pelt_fast.kernels\n"
        "assert kernels.who == 'hugging face'\n"
    )
    python(program, tmp_path, cwd=root)
