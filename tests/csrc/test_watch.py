"""``Watch``: whether what was read from Python is as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def watch(cpp: ModuleType) -> Callable[..., Any]:
    def watch(
        objects: Any = (),
        entries: Any = (),
        tensors: Any = (),
        contents: bool = False,
        samples: int = 16,
    ) -> Any:
        return cpp._C.Watch(list(objects), list(entries), list(tensors), contents, samples)

    return watch


def test_nothing(watch) -> None:
    assert watch().holds()


def test_classes_and_dictionaries_of_objects(watch) -> None:
    layer = nn.Linear(2, 2)
    seen = watch([layer])
    layer.anything = 3
    assert seen.holds()
    layer.__class__ = type("Other", (nn.Linear,), {})
    assert not seen.holds()
    layer.__class__ = nn.Linear
    assert seen.holds()
    layer.__dict__ = dict(layer.__dict__)
    assert not seen.holds()


def test_entries(watch) -> None:
    one, inner = object(), {}
    place: dict[Any, Any] = {"a": one, "dict": inner}
    seen = watch(entries=[(place, "a"), (place, "b"), (place, "dict")])
    place["c"] = 1
    assert seen.holds()
    inner["x"] = 1
    assert not seen.holds(), "the dictionary in it has grown"
    del inner["x"]
    assert seen.holds()
    place["b"] = None
    assert not seen.holds(), "what was not there is"
    del place["b"]
    place["a"] = object()
    assert not seen.holds()
    del place["a"]
    assert not seen.holds()
    place["a"] = one
    assert seen.holds()


def changes() -> list[Callable[[nn.Parameter], None]]:
    def version(t: nn.Parameter) -> None:
        with torch.no_grad():
            t.mul_(1)

    def data(t: nn.Parameter) -> None:
        t.data.mul_(2)

    def other_data(t: nn.Parameter) -> None:
        t.data = t.data.clone()

    return [version, data, other_data]


def forms() -> list[Callable[[nn.Parameter], None]]:
    def dtype(t: nn.Parameter) -> None:
        t.data = t.data.double()

    def sizes(t: nn.Parameter) -> None:
        t.data = t.data[:3]

    def kind(t: nn.Parameter) -> None:
        t.__class__ = type("Subclass", (nn.Parameter,), {})

    return [dtype, sizes, kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", changes() + forms())
def test_tensors(change, dtype, watch) -> None:
    t = nn.Parameter(torch.randn(6, 40).to(dtype)[:, ::2])
    seen, form = watch(tensors=[t], contents=True), watch(tensors=[t])
    assert seen.holds()
    if dtype is torch.float64 and change.__name__ == "dtype":
        return
    change(t)
    assert not seen.holds()
    assert form.holds() == (change.__name__ in ("version", "data", "other_data"))


def test_every_sample_counts(watch) -> None:
    for rows, samples in ((1, 1), (7, 16), (50, 16)):
        t = torch.arange(rows * 3.0).view(rows, 3)
        step = t.numel() // samples + 1
        for position in range(0, t.numel(), step):
            seen = watch(tensors=[t], contents=True, samples=samples)
            t.data.view(-1)[position] += 1
            assert not seen.holds()


def test_memory_that_is_gone(watch) -> None:
    t = torch.randn(100)
    seen = watch(tensors=[t], contents=True)
    t.untyped_storage().resize_(0)
    assert not seen.holds()
    watch(tensors=[t, torch.empty(0), torch.tensor(1.0)], contents=True).holds()


def test_inference_tensors_count_no_versions(watch) -> None:
    with torch.inference_mode():
        t = torch.ones(3)
    assert watch(tensors=[t]).holds()
    assert not watch(tensors=[t], contents=True).holds()


def test_what_it_saw_lives_as_long(watch) -> None:
    t = torch.randn(64)
    address = t.data_ptr()
    seen = watch(tensors=[t], contents=True)
    t.data = torch.zeros(64)
    others = [torch.empty(64) for _ in range(50)]
    assert all(other.data_ptr() != address for other in others)
    assert not seen.holds()


def test_errors(watch) -> None:
    with pytest.raises(TypeError, match="entries has what is in no dict"):
        watch(entries=[([], "a")])
    with pytest.raises(TypeError, match="tensors has what is no tensor"):
        watch(tensors=["a"])
    with pytest.raises(ValueError, match="samples is 0; expected at least 1"):
        watch(samples=0)
    with pytest.raises(RuntimeError):
        watch(entries=[3])
    with pytest.raises(TypeError, match="unhashable"):
        watch(entries=[({}, [])])
    with pytest.raises(AttributeError):
        watch(objects=[3])


def test_meta_and_subclasses(watch) -> None:
    class Wrapped(Tensor):
        pass

    t = torch.randn(3).as_subclass(Wrapped)
    seen = watch(tensors=[t, torch.empty(3, device="meta")], contents=True)
    assert seen.holds()
    t.mul_(2)
    assert not seen.holds()
