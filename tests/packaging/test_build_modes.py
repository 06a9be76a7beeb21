"""PELT_FAST_BUILD: auto leaves out what cannot be built; a part asked for by name must be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

BUILD = "from setuptools import build_meta\nprint(build_meta.build_wheel('out'))\n"
MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
CUDA = "#include <torch/headeronly/version.h>\n__global__ void kernel(float* x) { *x = 1; }\n"
NO_TORCH = "sys.modules['torch'] = None\n"


@pytest.fixture
def project(copy_project) -> Path:
    """A project whose extension takes no time to compile, or to fail."""
    project = copy_project()
    for path in {*project.glob("csrc/**/*.c*"), *project.glob("csrc/cuda/*")}:
        path.unlink()
    for part in ("cpu", "cuda"):
        (project / "csrc" / part).mkdir(parents=True, exist_ok=True)
    (project / "csrc" / "library.cpp").write_text(MODULE)
    return project


def record(project: Path) -> dict:
    (wheel,) = (project / "out").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    found = json.loads(archive.read("pelt_fast/_build_info.json"))
    found["wheel"] = wheel.name
    found["extension"] = [name for name in archive.namelist() if name.endswith(".so")]
    return found


@pytest.mark.parametrize("mode", ["auto", pytest.param("cpu", marks=pytest.mark.slow)])
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
        ("cuda", "", {"CUDA_HOME": "/nothing"}, "nvcc is not /nothing/bin"),
    ],
)
def test_what_was_asked_for_by_name_must_be_built(project, python, mode, prelude, env, reason):
    (project / "csrc" / "cuda" / "kernel.cu").write_text(CUDA)
    result = python(prelude + BUILD, cwd=project, ok=False, PELT_FAST_BUILD=mode, **env)
    assert result.returncode != 0
    assert f"PELT_FAST_BUILD={mode} cannot be built: " in result.stderr
    assert reason in result.stderr
    assert not list((project / "out").glob("*.whl"))


def test_unknown_mode_names_the_known_ones(project: Path, python):
    result = python(BUILD, cwd=project, ok=False, PELT_FAST_BUILD="gpu")
    assert result.returncode != 0
    assert "got 'gpu', expected one of auto, none, cpu, cuda" in result.stderr


def test_cuda_without_sources_is_not_built(project: Path, python):
    result = python(BUILD, cwd=project, ok=False, PELT_FAST_BUILD="cuda")
    assert result.returncode != 0
    assert "PELT_FAST_BUILD=cuda cannot be built: no sources under csrc/cuda" in result.stderr


def test_auto_leaves_cuda_out_where_torch_has_none(project: Path, python):
    (project / "csrc" / "cuda" / "kernel.cu").write_text(CUDA)
    no_cuda = "import torch\ntorch.version.cuda = None\n"
    result = python(no_cuda + BUILD, cwd=project, PELT_FAST_BUILD="auto")
    assert "left out cuda: torch" in result.stdout
    assert "was built without CUDA" in result.stdout
    assert record(project)["built"] == ["cpu"]


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no CUDA toolkit: nvcc is not on PATH"
)


@needs_nvcc
def test_cuda_is_a_library_of_its_own(project: Path, python):
    (project / "csrc" / "cuda" / "kernel.cu").write_text(CUDA)
    environment = {"PELT_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    result = python(BUILD, cwd=project, **environment)
    assert "pelt_fast: built cpu, cuda" in result.stdout
    for code in ("sm_80", "sm_90", "compute_90"):
        assert f"code={code}" in result.stdout
    found = record(project)
    assert found["built"] == ["cpu", "cuda"]
    assert "pelt_fast/_cuda.so" in found["extension"]


@needs_nvcc
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_cuda_that_does_not_compile(project: Path, python, mode: str):
    (project / "csrc" / "cuda" / "kernel.cu").write_text("#error broken\n")
    release = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    major = release.partition("release ")[2].partition(".")[0]
    with_cuda = f"import torch\ntorch.version.cuda = '{major}.0'\n"
    environment = {"PELT_FAST_BUILD": mode, "TORCH_CUDA_ARCH_LIST": "8.0"}
    result = python(with_cuda + BUILD, cwd=project, ok=mode == "auto", **environment)
    if mode == "auto":
        assert "left out cuda: compilation failed" in result.stdout
        assert record(project)["built"] == ["cpu"]
    else:
        assert result.returncode != 0
        assert "PELT_FAST_BUILD=cuda cannot be built: compilation failed" in result.stderr


@needs_nvcc
def test_cuda_of_another_version_than_torchs(project: Path, python):
    (project / "csrc" / "cuda" / "kernel.cu").write_text(CUDA)
    other = "import torch\ntorch.version.cuda = '9.2'\n"
    result = python(other + BUILD, cwd=project, ok=False, PELT_FAST_BUILD="cuda")
    assert result.returncode != 0
    assert "torch was built with 9.2" in result.stderr


@needs_nvcc
def test_a_compiler_without_headers_is_not_enough(project: Path, python, tmp_path: Path):
    (project / "csrc" / "cuda" / "kernel.cu").write_text(CUDA)
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'error: cuda_runtime.h: no such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = python(
        BUILD, cwd=project, ok=False, PELT_FAST_BUILD="cuda", CUDA_HOME=os.fspath(tmp_path)
    )
    assert result.returncode != 0
    assert "cannot build a program with cuda_runtime.h: error" in result.stderr
