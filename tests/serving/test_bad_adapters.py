"""What does not fit is refused with its reason, and nothing that is loaded changes by a bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelt_fast.serving import AdapterPool

from .bad import BAD, CONFIG, GOOD, KEY, WEIGHTS, good_bytes, spoiled
from .exact import Adapter, Net, contents, pool_of, same


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def pool(net: Net) -> AdapterPool:
    pool = pool_of(net, slots=2)
    for i in range(2):
        adapter = Adapter(i)
        pool.load(str(i), adapter.state, adapter.config)
    return pool


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters(name: str, net: Net, pool: AdapterPool, tmp_path: Path):
    folder = spoiled(name, tmp_path / "adapter")
    before, names = contents(net), pool.names
    with pytest.raises((ValueError, FileNotFoundError), match=BAD[name][1]) as caught:
        pool.load("1", folder)
    assert len(str(caught.value)) < 1000
    assert same(contents(net), before)
    assert pool.names == names


def test_the_good_one_is_good(net: Net, pool: AdapterPool, tmp_path: Path):
    pool.load("folder", GOOD.save(tmp_path / "folder"))
    by_folder = contents(net)
    pool.load("folder", tmp_path / "folder" / WEIGHTS)
    assert same(contents(net), by_folder)
    pool.load("folder", GOOD.state, GOOD.config)
    assert same(contents(net), by_folder)


def test_paths(pool: AdapterPool, tmp_path: Path):
    GOOD.save(tmp_path)
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path, error, match in (
        (tmp_path / "nothing", FileNotFoundError, "neither a folder nor a file"),
        (tmp_path / "fifo.safetensors", FileNotFoundError, "neither a folder nor a file"),
        (tmp_path / "x.bin", ValueError, "is a pickle"),
        (tmp_path / CONFIG, ValueError, "no safetensors file"),
        ("x" * 5000, OSError, "cannot be read|neither"),
        ("a\0b", (OSError, ValueError), "null|neither"),
    ):
        with pytest.raises(error, match=match):
            pool.load("x", path)


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        (3, torch.ones(1), TypeError, "a key that is a int"),
        ("x", [1.0], TypeError, "x is a list"),
        ("x", torch.ones(1, device="meta"), ValueError, "on the device meta"),
        ("x", torch.ones(2, 2).to_sparse(), ValueError, "of layout"),
        (KEY.format("A"), torch.ones(1, 1).expand(4, 8), ValueError, "is expanded"),
        (KEY.format("A"), torch.ones(4, 8, dtype=torch.bool), ValueError, "dtype torch.bool"),
    ],
)
def test_bad_mappings(key, value, error, match, pool: AdapterPool):
    with pytest.raises(error, match=match):
        pool.load("x", {**GOOD.state, key: value}, GOOD.config)
    assert "x" not in pool


RAW = good_bytes()
BYTES = st.one_of(
    st.binary(max_size=300),
    st.integers(0, len(RAW)).map(lambda n: RAW[:n]),
    st.builds(
        lambda at, new: RAW[:at] + new + RAW[at + len(new) :],
        st.integers(0, len(RAW)),
        st.binary(min_size=1, max_size=8),
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(raw=BYTES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes(raw: bytes, tmp_path_factory):
    net = Net()
    pool = pool_of(net, slots=1)
    folder = GOOD.save(tmp_path_factory.mktemp("any"))
    (folder / WEIGHTS).write_bytes(raw)
    _loads_or_refuses(net, pool, folder)


@given(
    name=st.sampled_from([*GOOD.config, "layers_to_transform", "exclude_modules", "x"]), value=JSON
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_config(name: str, value: object, tmp_path_factory):
    net = Net()
    pool = pool_of(net, slots=1)
    folder = GOOD.save(tmp_path_factory.mktemp("any"))
    (folder / CONFIG).write_text(json.dumps({**GOOD.config, name: value}))
    _loads_or_refuses(net, pool, folder)


def _loads_or_refuses(net: Net, pool: AdapterPool, folder: Path) -> None:
    before = contents(net)
    try:
        pool.load("x", folder)
    except ValueError:
        assert same(contents(net), before)
        assert pool.names == ()
