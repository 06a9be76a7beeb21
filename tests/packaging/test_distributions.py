"""Wheel, sdist and editable install hold the kernels and can be imported."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

BACKEND = "from setuptools import build_meta\nprint(build_meta.{hook}({folder!r}))\n"
IMPORT = """
import importlib.util, pathlib, sys
import torch, pelt_fast, pelt_fast.env
assert pathlib.Path(pelt_fast.__file__).parent.parent.samefile({location!r}), pelt_fast.__file__
for name in {kernels!r}:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin.endswith('.py'), name
assert importlib.util.find_spec('pelt_fast._C') is None, 'built although PELT_FAST_BUILD=none'
x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(3, 8), torch.ones(4, 3)
y = pelt_fast.functional.lora_linear(x, w, None, a, b, 0.5)
assert y.shape == (2, 4) and torch.equal(y, torch.full((2, 4), 8 + 0.5 * 24)), y
"""


@pytest.fixture(scope="module")
def kernel_files(root: Path) -> set[str]:
    found = {path.relative_to(root / "kernels").as_posix() for path in root.glob("kernels/**/*.py")}
    assert found, "there are no kernels"
    return found


@pytest.fixture(scope="module")
def kernel_modules(kernel_files: set[str]) -> list[str]:
    names = (name.removesuffix(".py").removesuffix("/__init__") for name in kernel_files)
    return sorted("pelt_fast.kernels." + name.replace("/", ".") for name in names)


@pytest.fixture(scope="module")
def project(copy_project) -> Path:
    return copy_project()


@pytest.fixture(scope="module")
def build(python):
    """A function that runs one hook of the build backend in a project, the way pip does."""

    def run(project: Path, hook: str) -> Path:
        out = project / "out"
        program = BACKEND.format(hook=hook, folder=str(out))
        result = python(program, cwd=project, PELT_FAST_BUILD="none")
        return out / result.stdout.strip().splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def wheel(project: Path, build) -> Path:
    return build(project, "build_wheel")


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_its_kernels_only(wheel: Path, root: Path, kernel_files):
    names = contents(wheel)
    assert {name.split("/")[0] for name in names} == {"pelt_fast"}
    assert {f"pelt_fast/kernels/{name}" for name in kernel_files} <= names
    modules = root.glob("pelt_fast/*/*.py")
    assert {path.relative_to(root).as_posix() for path in modules} <= names
    assert {"pelt_fast/py.typed", "pelt_fast/_build_info.json"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]


def test_wheel_without_extension_is_pure(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_names_license_and_version(wheel: Path):
    import pelt_fast

    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert f"Version: {pelt_fast.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_wheel_can_be_imported(wheel: Path, python, tmp_path: Path, kernel_modules):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    location = str(tmp_path / "site")
    program = IMPORT.format(location=location, kernels=kernel_modules)
    python(program, tmp_path / "site", cwd=tmp_path)


def test_sdist_holds_all_that_a_build_needs(
    project: Path, build, wheel: Path, root: Path, tmp_path: Path, kernel_files
):
    sdist = build(project, "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    for name in kernel_files:
        assert (unpacked / "pelt_fast" / "kernels" / name).is_file()
    for path in root.glob("csrc/**/*.[ch]*"):
        assert (unpacked / path.relative_to(root)).is_file()
    assert not (unpacked / "kernels").exists()
    assert contents(build(unpacked, "build_wheel")) == contents(wheel)


def test_editable_install_can_be_imported(copy_project, build, python, tmp_path, kernel_modules):
    project = copy_project()
    editable = build(project, "build_editable")
    zipfile.ZipFile(editable).extractall(tmp_path / "site")
    program = IMPORT.format(location=str(project), kernels=kernel_modules)
    python(program, tmp_path / "site", cwd=tmp_path)
