"""What a pool does, one call after another."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import pelt_fast
from pelt_fast.nn import MultiLoRALinear
from pelt_fast.serving import AdapterPool, PoolFull, UnknownAdapter

from .exact import Adapter, Net, contents, inputs, oracle, pool_of, same

ADAPTERS = {name: Adapter(seed) for seed, name in enumerate("abcdefgh")}


def load(pool: AdapterPool, *names: str, **options: object) -> None:
    for name in names:
        pool.load(name, ADAPTERS[name].state, ADAPTERS[name].config, **options)


def check_rows(net: Net, pool: AdapterPool, names: list[str | None], tokens=None, seed=0) -> None:
    x = inputs(len(names), 3, seed)
    with torch.inference_mode(), pool.batch(names, tokens):
        y = net(x)
    for row, value, name in zip(y, x, names, strict=True):
        assert torch.equal(row, oracle(net, value, ADAPTERS.get(name)))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def pool(net: Net) -> AdapterPool:
    return pool_of(net)


def test_lazy_export():
    assert pelt_fast.AdapterPool is AdapterPool


def test_each_sample_has_its_own_adapter(net, pool):
    load(pool, "a", "b", "c")
    names = ["c", None, "a", "b", "__base__", "a"]
    check_rows(net, pool, names)
    check_rows(net, pool, names, 3)
    check_rows(net, pool, names, [3] * 6)
    check_rows(net, pool, [None, None])
    check_rows(net, pool, [])


def test_packed_tokens(net, pool):
    load(pool, "a", "b")
    x, names, counts = inputs(1, 7, 1)[0], ["b", None, "a", "b"], [3, 1, 0, 3]
    with torch.inference_mode(), pool.batch(names, counts) as plan:
        y = net(x)
    assert plan.tokens == 7
    for row, value, name in zip(y.split(counts), x.split(counts), names, strict=True):
        assert torch.equal(row, oracle(net, value, ADAPTERS.get(name)))


def test_outside_of_a_batch_the_model_is_the_base(net, pool):
    x = inputs(2, 3, 0)
    before = Net()(x)
    load(pool, "a")
    assert torch.equal(net(x), before)
    with pool.batch(["a", "a"]):
        thread_saw = []
        thread = threading.Thread(target=lambda: thread_saw.append(net(x)))
        thread.start()
        thread.join()
    assert torch.equal(thread_saw[0], before)


def test_parameters_and_state_dict_are_the_base_models(net):
    before, names = copy.deepcopy(net.state_dict()), [n for n, _ in net.named_parameters()]
    pool = pool_of(net)
    load(pool, "a")
    assert [n for n, _ in net.named_parameters()] == names
    assert list(net.state_dict()) == list(before)
    other = Net(1).state_dict()
    net.load_state_dict(other)
    check_rows(net, pool, ["a", None])
    net.load_state_dict(before, assign=True)
    check_rows(net, pool, ["a", None])
    pool.restore()
    assert torch.equal(net.block.up.weight, before["block.up.weight"])


def test_layers_share_weights_and_come_back(net):
    linears = [net.block.up, net.block.down, net.out]
    weights = [linear.weight for linear in linears]
    pool = pool_of(net)
    served = [net.block.up, net.block.down, net.out]
    assert all(isinstance(layer, MultiLoRALinear) for layer in served)
    assert all(layer.weight is w for layer, w in zip(served, weights, strict=True))
    net.eval()
    pool.restore()
    assert [net.block.up, net.block.down, net.out] == linears
    assert not net.out.training
    assert all(linear.weight is w for linear, w in zip(linears, weights, strict=True))
    pool.restore()
    for call in (lambda: load(pool, "a"), lambda: pool.batch(["a"]).__enter__()):
        with pytest.raises(RuntimeError, match="restored"):
            call()
    pool_of(net)  # another one may follow


def test_restore_waits_for_nobody(net, pool):
    with pool.batch([None]):
        pool.restore()  # a batch of the base alone holds nothing
    net = Net()
    pool = pool_of(net)
    load(pool, "a")
    with pool.batch(["a"]), pytest.raises(RuntimeError, match="running"):
        pool.restore()
    layer, net.out = net.out, nn.Identity()
    with pytest.raises(RuntimeError, match="out: another module"):
        pool.restore()
    net.out = layer
    pool.restore()


def test_two_pools_on_two_models(net, pool):
    other = Net(5)
    others = pool_of(other)
    load(pool, "a")
    load(others, "b", "a")
    x = inputs(2, 3, 0)
    with torch.inference_mode(), pool.batch(["a", None]), others.batch(["b", "a"]):
        y, z = net(x), other(x)
        assert torch.equal(y[0], ADAPTERS["a"](net, x[0]))
        assert torch.equal(z[0], ADAPTERS["b"](other, x[0]))
        with pool.batch([None, "a"]):
            assert torch.equal(net(x)[1], ADAPTERS["a"](net, x[1]))
        assert torch.equal(net(x), y)


def test_the_least_recently_used_goes(net, pool):
    load(pool, "a", "b", "c", "d")
    with pool.batch(["a"]):
        pass
    assert pool.names == ("b", "c", "d", "a")
    load(pool, "e")
    assert pool.names == ("c", "d", "a", "e")
    pool.pin("c")
    load(pool, "f")
    assert pool.names == ("c", "a", "e", "f")
    with pool.batch(["a", "e"]):
        load(pool, "g")
    assert set(pool.names) == {"c", "a", "e", "g"}
    assert pool.resident["c"].pinned
    assert "c" in pool
    assert len(pool) == 4
    check_rows(net, pool, ["a", "c", "e", "g"])


def test_pins(net, pool):
    load(pool, "a", "b", "c", "d", pin=True)
    with pytest.raises(PoolFull, match=r"'e': of 4, 4 are pinned"):
        load(pool, "e")
    with pytest.raises(ValueError, match="'a' is pinned"):
        pool.evict("a")
    load(pool, "a")
    assert pool.resident["a"].pinned  # a replaced one stays pinned
    pool.unpin("a")
    load(pool, "e")
    assert "a" not in pool
    for call in (pool.pin, pool.unpin, pool.evict):
        with pytest.raises(UnknownAdapter, match="'a' is not in the pool"):
            call("a")


def test_unknown_names_hold_nothing(pool):
    load(pool, "a")
    with pytest.raises(KeyError, match="adapter 'nobody' is not in the pool") as caught:
        pool.batch(["a", "nobody"]).__enter__()
    assert isinstance(caught.value, UnknownAdapter)
    assert pool.resident["a"].in_use == 0


def test_a_slot_in_use_is_never_written(net):
    pool = pool_of(net, slots=1)
    load(pool, "a")
    x = inputs(1, 3, 0)
    with torch.inference_mode(), pool.batch(["a"]):
        with pytest.raises(PoolFull):
            load(pool, "b")
        with pytest.raises(PoolFull, match=r"for 0\.05 s"):
            load(pool, "b", timeout=0.05)
        pool.evict("a")  # gone for others, not for this batch
        assert pool.names == ()
        with pytest.raises(PoolFull):
            load(pool, "b")
        assert torch.equal(net(x)[0], ADAPTERS["a"](net, x[0]))
    load(pool, "b")
    check_rows(net, pool, ["b"])


def test_a_load_waits_for_a_slot(net):
    pool = pool_of(net, slots=1)
    load(pool, "a")
    with pool.batch(["a"]):
        thread = threading.Thread(target=lambda: load(pool, "b", timeout=60))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join()
    assert pool.names == ("b",)
    check_rows(net, pool, ["b"])


def test_a_replaced_adapter_stays_with_those_who_use_it(net):
    pool = pool_of(net, slots=2)
    load(pool, "a")
    x = inputs(1, 3, 0)
    with torch.inference_mode(), pool.batch(["a"]):
        pool.load("a", ADAPTERS["b"].state, ADAPTERS["b"].config)
        assert torch.equal(net(x)[0], ADAPTERS["a"](net, x[0]))
        with pool.batch(["a"]):
            assert torch.equal(net(x)[0], ADAPTERS["b"](net, x[0]))
        with pytest.raises(PoolFull):
            pool.pin("a") or load(pool, "c")
    load(pool, "c")
    assert set(pool.names) == {"a", "c"}
    one = pool_of(Net(), slots=1)
    load(one, "a")
    load(one, "a")  # over itself
    assert one.names == ("a",)


def test_tails_are_zeros(net):
    pool = pool_of(net, slots=1)
    big = next(
        a for a in map(Adapter, range(100)) if sum(len(p[0]) for p in a.weights.values()) > 10
    )
    less = next(
        a
        for a in map(Adapter, range(100))
        if list(a.weights) == ["out"] and len(a.weights["out"][0]) == 1
    )
    pool.load("x", big.state, big.config)
    pool.load("x", less.state, less.config)
    fresh = Net()
    pool_of(fresh, slots=1).load("x", less.state, less.config)
    assert same(contents(net), contents(fresh))


def test_a_failed_write_frees_the_slot(net, monkeypatch):
    pool = pool_of(net, slots=2)
    load(pool, "a", pin=True)
    with monkeypatch.context() as patched:

        def fail(*args):
            raise RuntimeError("out of memory")

        patched.setattr(type(net.out), "write", fail)
        for name in "bcd":
            with pytest.raises(RuntimeError, match="out of memory"):
                load(pool, name)
    assert pool.names == ("a",)
    load(pool, "b")
    check_rows(net, pool, ["a", "b"])


def test_a_thousand_adapters(net):
    pool = pool_of(net, slots=1024)
    numbers = sum(1024 * 4 * (i + o) * 4 + 1024 * 8 for i, o in [(8, 12), (12, 8), (8, 6)])
    assert pool.bytes() == numbers
    adapters = [Adapter(seed) for seed in range(1024)]
    for i, adapter in enumerate(adapters):
        pool.load(str(i), adapter.state, adapter.config)
    assert len(pool) == 1024
    x = inputs(1024, 1, 3)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode(), pool.batch([str(i) for i in order], 1):
        y = net(x)
    for row, value, i in zip(y, x, order, strict=True):
        assert torch.equal(row, adapters[i](net, value))


@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float64, None),
    ],
)
def test_dtypes(base, dtype):
    """Sums of these integers are exact in halves too where they are small: the last layer alone has LoRA."""
    net = Net().to(base)
    pool = pool_of(net, dtype=dtype)
    assert net.out.lora_a.dtype == (dtype or base)
    adapter = next(a for a in map(Adapter, range(100)) if list(a.weights) == ["out"])
    pool.load("a", adapter.state, adapter.config)
    x = inputs(2, 3, 0).to(base)
    with torch.inference_mode():
        hidden = net.block(x)
        base_y = net.out(hidden)
        with pool.batch(["a", None]):
            y = net.out(hidden)
    a, b = adapter.weights["out"]
    scaling = adapter.alphas["out"] / len(a)
    delta = scaling * (hidden[0].double() @ a.double().T @ b.double().T)
    torch.testing.assert_close(y[0].double(), base_y[0].double() + delta, rtol=2**-6, atol=0.5)
    assert torch.equal(y[1], base_y[1])


def test_the_model_may_be_cast_while_nothing_runs(net, pool):
    load(pool, "a")
    net.double()
    assert net.out.scaling.dtype == torch.float32
    x = inputs(2, 3, 0).double()
    with torch.inference_mode(), pool.batch(["a", None]):
        assert torch.equal(net(x)[0], ADAPTERS["a"](net, x[0]))


def test_a_served_model_is_not_copied(net, pool):
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"restore\(\) it first"):
            call(net)
    pool.restore()
    copy.deepcopy(net)


def test_rows_that_do_not_divide(net, pool):
    load(pool, "a")
    with pool.batch(["a", None]), pytest.raises(ValueError, match=r"3 rows.*multiple of .* 2"):
        net(inputs(1, 3, 0)[0])
    for sequences, length in ((1, 4), (3, 4)):  # half of a sequence is nobody's sample
        message = rf"with {sequences} sequences.*multiple of .* 2"
        with pool.batch(["a", None]), pytest.raises(ValueError, match=message):
            net(inputs(sequences, length, 0))
    with pool.batch(["a", None]):
        net(inputs(4, 3, 0))
    with pool.batch(["a"], 2), pytest.raises(ValueError, match="3 rows; expected the batch's 2"):
        net(inputs(1, 3, 0))
    assert pool.resident["a"].in_use == 0


@pytest.mark.parametrize(
    ("names", "tokens", "error", "match"),
    [
        ("a", None, TypeError, "adapter_names is a str"),
        ({"a"}, None, TypeError, "adapter_names is a set"),
        ([1], None, TypeError, "adapter_names has a int"),
        (["a"], "1", TypeError, "tokens has a str"),
        (["a"], 1.5, TypeError, "tokens is a float"),
        (["a"], True, TypeError, "tokens is a bool"),
        (["a"], [1.0], TypeError, "tokens has a float"),
        (["a"], [1, 2], ValueError, "tokens has 2 entries; expected 1"),
        (["a"], -1, ValueError, "tokens has -1"),
    ],
)
def test_batch_arguments(pool, names, tokens, error, match):
    load(pool, "a")
    with pytest.raises(error, match=match):
        pool.batch(names, tokens).__enter__()
    assert pool.resident["a"].in_use == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"name": 1}, TypeError, "name is a int"),
        ({"name": ""}, ValueError, "stands for no adapter"),
        ({"name": "__base__"}, ValueError, "stands for no adapter"),
        ({"timeout": -1}, ValueError, "timeout is -1"),
        ({"timeout": float("nan")}, ValueError, "timeout is nan"),
        ({"source": 3}, TypeError, "source is a int"),
        ({"config": None}, TypeError, "config is None"),
        ({"config": 3}, TypeError, "config is a int"),
    ],
)
def test_load_arguments(pool, arguments, error, match):
    given = {"name": "a", "source": ADAPTERS["a"].state, "config": ADAPTERS["a"].config}
    with pytest.raises(error, match=match):
        pool.load(**{**given, **arguments})
    assert pool.names == ()


def _hooked() -> nn.Module:
    net = Net()
    net.out.register_forward_hook(lambda *args: None)
    return net


def _tied() -> nn.Module:
    net = Net()
    net.again = net.out
    return net


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (Net, {"slots": 0}, ValueError, "slots is 0; expected 1"),
        (Net, {"slots": 2.0}, TypeError, "slots is a float"),
        (Net, {"max_rank": 257}, ValueError, "max_rank is 257; expected 1 to 256"),
        (Net, {"dtype": torch.bfloat16}, ValueError, "dtype is torch.bfloat16"),
        (Net, {"target_modules": ["up", "q_proj"]}, ValueError, r"\['q_proj'\]"),
        (Net, {"target_modules": []}, TypeError, "target_modules is"),
        (Net, {"target_modules": 3}, TypeError, "target_modules is 3"),
        (Net, {"target_modules": "("}, ValueError, "no pattern"),
        (Net, {"target_modules": ["block"]}, ValueError, "block cannot be served: it is a .*Block"),
        (Net, {"target_modules": ["unserved"]}, ValueError, "Embedding"),
        (_hooked, {}, ValueError, "out cannot be served: it has hooks"),
        (_tied, {"target_modules": ["out", "again"]}, ValueError, "out and again are the same"),
        (lambda: Net().to("meta"), {}, ValueError, "device meta"),
        (lambda: 3, {}, TypeError, "model is a int"),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 8),
            {"target_modules": ["linear1"]},
            ValueError,
            "reads its weight",
        ),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 8),
            {"target_modules": ["out_proj"]},
            ValueError,
            "NonDynamicallyQuantizableLinear",
        ),
    ],
)
def test_arguments(model, options, error, match):
    made = model()
    given = {"target_modules": ["up", "down", "out"], "slots": 2, "max_rank": 4, **options}
    before = list(made.modules()) if isinstance(made, nn.Module) else None
    with pytest.raises(error, match=match):
        AdapterPool(made, **given)
    assert before is None or list(made.modules()) == before


def test_one_pool_a_model(net, pool):
    with pytest.raises(ValueError, match="another pool serves it already"):
        pool_of(net)


@pytest.mark.parametrize(
    "targets", ["all-linear", r"(block\.)?(up|down|out)", ["block.up", "down", "out"]]
)
def test_ways_to_say_targets(targets):
    pool = AdapterPool(Net(), targets, slots=1, max_rank=4)
    assert pool.target_modules == ("block.up", "block.down", "out")
