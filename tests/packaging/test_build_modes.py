"""PELT_FAST_BUILD: auto leaves out what cannot be built; a part asked for by name must be."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

BUILD = "from setuptools import build_meta\nprint(build_meta.build_wheel('out'))\n"
MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
NO_TORCH = "sys.modules['torch'] = None\n"


@pytest.fixture
def project(copy_project) -> Path:
    """A project whose extension takes no time to compile, or to fail."""
    project = copy_project()
    for path in project.glob("csrc/**/*.c*"):
        path.unlink()
    (project / "csrc" / "cpu").mkdir(parents=True, exist_ok=True)
    (project / "csrc" / "library.cpp").write_text(MODULE)
    return project


def record(project: Path) -> dict:
    (wheel,) = (project / "out").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    found = json.loads(archive.read("pelt_fast/_build_info.json"))
    found["wheel"] = wheel.name
    found["extension"] = [name for name in archive.namelist() if name.endswith(".so")]
    return found


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_extension_is_built(project: Path, python, mode: str):
    result = python(BUILD, cwd=project, PELT_FAST_BUILD=mode)
    assert "pelt_fast: built cpu" in result.stdout
    found = record(project)
    assert found["built"] == ["cpu"]
    assert len(found["extension"]) == 1
    assert found["torch"] is not None
    assert "none-any" not in found["wheel"]


def test_a_new_source_file_needs_no_change_of_the_build(project: Path, python):
    (project / "csrc" / "cpu" / "new_family.cpp").write_text("#error the new file is compiled\n")
    result = python(BUILD, cwd=project, ok=False, PELT_FAST_BUILD="cpu")
    assert result.returncode != 0
    assert "the new file is compiled" in result.stdout + result.stderr


def test_auto_without_torch_is_pure_python(project: Path, python):
    result = python(NO_TORCH + BUILD, cwd=project, PELT_FAST_BUILD="auto")
    assert "left out cpu: no torch in the build environment" in result.stdout
    assert "--no-build-isolation" in result.stdout
    assert record(project)["wheel"].endswith("none-any.whl")


def test_auto_without_compiler_is_pure_python(project: Path, python):
    result = python(BUILD, cwd=project, PELT_FAST_BUILD="auto", CXX="no-such-compiler")
    assert "left out cpu: no C++ compiler: no-such-compiler" in result.stdout
    found = record(project)
    assert found["built"] == []
    assert "no-such-compiler" in found["left_out"]["cpu"]
    assert found["wheel"].endswith("none-any.whl")


def test_auto_goes_on_without_what_does_not_compile(project: Path, python):
    (project / "csrc" / "cpu" / "broken.cpp").write_text("#error broken\n")
    result = python(BUILD, cwd=project, PELT_FAST_BUILD="auto")
    assert "left out cpu: compilation failed" in result.stdout
    found = record(project)
    assert found["built"] == []
    assert found["extension"] == []


@pytest.mark.parametrize(
    ("mode", "prelude", "env", "reason"),
    [
        ("cpu", NO_TORCH, {}, "no torch in the build environment"),
        ("cpu", "", {"CXX": "no-such-compiler"}, "no-such-compiler is not on PATH"),
        ("cuda", "", {}, "no sources under csrc/cuda"),
    ],
)
def test_what_was_asked_for_by_name_must_be_built(project, python, mode, prelude, env, reason):
    for path in project.glob("csrc/cuda/*"):
        path.unlink()
    result = python(prelude + BUILD, cwd=project, ok=False, PELT_FAST_BUILD=mode, **env)
    assert result.returncode != 0
    assert f"PELT_FAST_BUILD={mode} cannot be built: " in result.stderr
    assert reason in result.stderr
    assert not list((project / "out").glob("*.whl"))


def test_unknown_mode_names_the_known_ones(project: Path, python):
    result = python(BUILD, cwd=project, ok=False, PELT_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert "got 'gpu', expected one of auto, none, cpu, cuda" in result.stderr
