"""A private copy of the project, so that building it leaves the checkout alone."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels")
OUTPUTS = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def copy_project(tmp_path_factory: pytest.TempPathFactory):
    """A function that copies what a build reads, symlink included, into a new folder."""

    def copy() -> Path:
        target = tmp_path_factory.mktemp("project")
        for name in (*PROJECT, "pelt_fast"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, symlinks=True, ignore=OUTPUTS)
            else:
                shutil.copy(source, target)
        return target

    return copy


@pytest.fixture(scope="session")
def python(interpreters):
    """A function that runs a program in an interpreter which sees the given paths before the
    installed packages, and of the installed packages no ``.pth`` file: no editable install.

    It has imported torch already, unless it is `fresh`.
    """

    def run(
        program: str, *paths: Path, cwd: Path, ok: bool = True, fresh: bool = False, **env: str
    ):
        environ = {"PATH": _path(), "HOME": str(Path.home()), "OMP_NUM_THREADS": "1", **env}
        result = interpreters(program, *paths, cwd=cwd, env=environ, fresh=fresh)
        if ok:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
