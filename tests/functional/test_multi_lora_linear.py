"""Batched multi-LoRA over its frozen linear: the sum of the two, from 128 tokens on in one pass on a CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import pelt_fast
from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.dispatch import cpp_extension
from pelt_fast.ops import multi_lora_linear_bwd, multi_lora_linear_fwd

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RIDES = 128
"""From so many tokens on the adapters ride on the product."""
TOKENS = [(1,), (40,), (RIDES - 1,), (2, RIDES // 2), (301,)]
IN, OUT, R, L = 70, 53, 19, 5
NAMES = ("x", "lora_a", "lora_b", "row_scale")


class Drawn:
    """One call; adapter 1 has rank 0, some tokens have none, or one that is not there."""

    def __init__(
        self, shape, dtype=torch.float32, *, rank_major=True, bias=True, row_scale=True, ids=None, sizes=(IN, OUT, R)
    ):  # fmt: skip
        n, out, rank = sizes
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, std=1.0):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

        self.weight, self.bias = draw(out, n, std=n**-0.5), draw(out) if bias else None
        lora_b = draw(L, rank, out, std=rank**-0.5).transpose(1, 2)
        tokens = torch.Size(shape).numel()
        self.ids = torch.randint(-1, L + 1, (tokens,), generator=generator) if ids is None else ids
        self.plan = MultiAdapterPlan(self.ids, L)
        self.leaves = {
            "x": draw(*shape, n),
            "lora_a": draw(L, rank, n, std=n**-0.5),
            "lora_b": lora_b if rank_major else lora_b.contiguous(),
            "row_scale": draw(*shape, 1) if row_scale else None,
        }
        self.dy = draw(*shape, out)
        self.scaling = torch.tensor([0.5, 1.0, -2.0, 1.5, 4 / 3], dtype=torch.float64)
        self.scaling = self.scaling.to(torch.promote_types(dtype, torch.float32))
        self.ranks = torch.tensor([rank, 0, rank // 2, 1, rank], dtype=torch.int32)

    def to(self, dtype):
        found = object.__new__(Drawn)
        found.__dict__.update(self.__dict__)
        for name in ("weight", "bias", "dy", "scaling"):
            value = getattr(self, name)
            setattr(found, name, None if value is None else value.to(dtype))
        found.leaves = {k: None if t is None else t.to(dtype) for k, t in self.leaves.items()}
        return found

    def rows(self, index):
        """The call of these rows alone; x (n, in)."""
        found = object.__new__(Drawn)
        found.__dict__.update(self.__dict__)
        found.ids = self.ids[index]
        found.plan = MultiAdapterPlan(found.ids, L)
        found.dy = self.dy.reshape(-1, self.dy.shape[-1])[index]
        found.leaves = dict(self.leaves)
        for name in ("x", "row_scale"):
            t = self.leaves[name]
            found.leaves[name] = None if t is None else t.reshape(-1, t.shape[-1])[index]
        return found

    def run(self, function, wanted=NAMES, seed=0, **more):
        leaves = {
            k: None if t is None else t.detach().requires_grad_(k in wanted)
            for k, t in self.leaves.items()
        }
        torch.manual_seed(seed)
        y = function(self, leaves, **more)
        found = {"y": y.detach()}
        names = [k for k in wanted if leaves[k] is not None]
        if names:
            gradients = torch.autograd.grad(y, [leaves[k] for k in names], self.dy)
            found.update(zip(names, gradients, strict=True))
        return found

    def arguments(self, leaves, more):
        row_scale = leaves["row_scale"]
        keywords = {"ranks": self.ranks, "row_scale": row_scale, **more}
        return (leaves["lora_a"], leaves["lora_b"], self.plan, self.scaling), keywords


def ours(drawn, leaves, **more):
    rest, keywords = drawn.arguments(leaves, more)
    return PF.multi_lora_linear(leaves["x"], drawn.weight, drawn.bias, *rest, **keywords)


def apart(drawn, leaves, **more):
    rest, keywords = drawn.arguments(leaves, more)
    base = F.linear(leaves["x"], drawn.weight, drawn.bias)
    return PF.multi_lora(leaves["x"], *rest, base_out=base, **{"backend": "torch", **keywords})


def assert_as_exact(found, drawn, **more):
    """At most twice PyTorch's error, what a sum of K terms in another order may differ by, and a half's last bit."""
    peer, exact = drawn.run(apart, **more), drawn.to(torch.float64).run(apart, **more)
    dtype = drawn.dy.dtype
    terms = max(*drawn.weight.shape, drawn.dy[..., 0].numel())
    order = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * terms**0.5
    rounded = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    for name, value in exact.items():
        assert found[name].dtype == peer[name].dtype
        assert found[name].shape == value.shape
        assert found[name].stride() == peer[name].stride(), name
        error, allowed = ((t[name].double() - value).abs().max() for t in (found, peer))
        more = (4 * order + rounded) * (1 + value.abs().max())
        assert error <= 2 * allowed + more, (name, error, allowed)


def assert_same(one, other, names=None):
    for name in one if names is None else names:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_as_exact_as_the_two_apart(shape, dtype):
    drawn = Drawn(shape, dtype)
    assert_as_exact(drawn.run(ours), drawn)
    assert_as_exact(drawn.run(ours, dropout_p=0.3, training=True), drawn, dropout_p=0.3, training=True)  # fmt: skip


@pytest.mark.parametrize(("rank_major", "bias"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("sizes", [(8, 200, 1), (520, 16, 64), (800, 1030, 33), (33, 17, 256)])
def test_sizes_layouts_and_no_bias(sizes, rank_major, bias):
    drawn = Drawn((150,), rank_major=rank_major, bias=bias, row_scale=bias, sizes=sizes)
    assert_as_exact(drawn.run(ours), drawn)


@pytest.mark.parametrize("ids", ["none", "one", "sorted", "few"])
def test_how_tokens_name_adapters(ids):
    tokens = 200
    given = {
        "none": torch.full((tokens,), -1),
        "one": torch.full((tokens,), 2),
        "sorted": torch.arange(tokens) * L // tokens,
        "few": torch.where(torch.arange(tokens) == 77, 4, -1),
    }[ids]
    drawn = Drawn((tokens,), ids=given)
    found = drawn.run(ours)
    assert_as_exact(found, drawn)
    for g in set(range(L)) - set(given.tolist()):
        assert not found["lora_a"][g].any()
        assert not found["lora_b"][g].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40,), (200,)], ids=str)
def test_bits_do_not_depend_on_who_asks(shape, dtype):
    """Not on threads, which gradients are wanted, nor whether any is: a checkpoint runs without and with."""
    drawn = Drawn(shape, dtype)
    everything = drawn.run(ours)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_same(everything, drawn.run(ours))
    finally:
        torch.set_num_threads(before)
    for n in range(len(NAMES) + 1):
        for wanted in itertools.combinations(NAMES, n):
            found = drawn.run(ours, wanted)
            assert set(found) == {"y", *wanted}
            assert_same(found, everything)
    with torch.no_grad():
        assert_same(drawn.run(ours, ()), everything, ["y"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_has_the_gradients_of_its_rows_alone(dtype):
    """Also where these are too few to ride on the product, and in another order."""
    one_pass = cpp_extension() is not None and cpp_extension().isa() == "avx2"  # with many rows
    drawn = Drawn((301,), dtype)
    mixed = drawn.run(ours)
    backwards = drawn.rows(torch.arange(300, -1, -1)).run(ours)
    for g in range(L):
        mine = (drawn.ids == g).nonzero()[:, 0]
        assert 0 < len(mine) < RIDES
        alone = drawn.rows(mine).run(ours)
        for name in ("lora_a", "lora_b"):
            assert torch.equal(mixed[name][g], alone[name][g]), (name, g)
        assert torch.equal(mixed["row_scale"][mine], alone["row_scale"])
        if dtype is torch.float32 and one_pass:  # halves are rounded once more on the way without
            for name in ("y", "x"):
                assert torch.equal(mixed[name][mine], alone[name]), (name, g)
    names = ["row_scale"] if dtype is torch.float64 else ["y", "x", "row_scale"]  # MKL's product
    assert_same({name: mixed[name].flip(0) for name in names}, backwards)


def test_other_rows_do_not_matter():
    """NaN and infinity in the rows of the others."""
    drawn = Drawn((200,))
    mixed, mine = drawn.run(ours), drawn.ids == 2
    for value in (torch.nan, torch.inf):
        drawn.leaves["x"] = torch.where(mine[:, None], drawn.leaves["x"], value)
        drawn.dy = torch.where(mine[:, None], drawn.dy, value)
        found = drawn.run(ours)
        for name in ("y", "x", "row_scale"):
            assert torch.equal(found[name][mine], mixed[name][mine]), name
        for name in ("lora_a", "lora_b"):
            assert torch.equal(found[name][2], mixed[name][2]), name


@pytest.mark.parametrize("tokens", [40, 200])
def test_views(tokens):
    drawn = Drawn((tokens,), row_scale=False)
    plain, leaves = drawn.run(ours), dict(drawn.leaves)
    wide = torch.randn(tokens, IN + 9)
    wide[:, 4 : 4 + IN] = leaves["x"]
    for view in (wide[:, 4 : 4 + IN], leaves["x"].T.contiguous().T):
        drawn.leaves = {**leaves, "x": view}
        assert_same(drawn.run(ours), plain)
    weight = drawn.weight
    drawn.weight = weight.T.contiguous().T
    assert_same(drawn.run(ours), plain)
    drawn.weight = weight
    drawn.dy = torch.ones(()).expand(tokens, OUT)
    spread = drawn.run(ours)
    drawn.dy = drawn.dy.contiguous()
    assert_same(spread, drawn.run(ours))


@pytest.mark.parametrize("tokens", [40, 200])
def test_trained_base(tokens):
    """A weight or a bias that trains gets its gradient, as from the two apart."""
    drawn = Drawn((tokens,))
    for names in (("weight",), ("bias",), ("weight", "bias")):
        results = []
        for function in (ours, apart):
            parts = [getattr(drawn, name).requires_grad_() for name in names]
            y = function(drawn, drawn.leaves)
            results.append(torch.autograd.grad(y, parts, drawn.dy))
            for name in names:
                setattr(drawn, name, getattr(drawn, name).detach())
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [40, 200])
def test_bits_with_a_bias_that_trains(tokens, dtype):
    """A checkpoint runs without gradients, and again with them."""
    drawn = Drawn((tokens,), dtype)
    drawn.bias.requires_grad_()
    with torch.no_grad():
        without = ours(drawn, drawn.leaves)
    assert torch.equal(ours(drawn, drawn.leaves), without)


def test_changed_weights_are_seen():
    drawn = Drawn((200,))
    drawn.run(ours)
    drawn.weight.mul_(2.0)
    assert_as_exact(drawn.run(ours), drawn)
    leaves = {**drawn.leaves, "x": drawn.leaves["x"].requires_grad_()}
    y = ours(drawn, leaves)
    drawn.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(drawn.dy)


def test_under_autocast():
    drawn = Drawn((200,))
    with torch.autocast("cpu", torch.bfloat16):
        found, peer = drawn.run(ours), drawn.run(apart)
    for name, value in peer.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=0.05 * value.abs().max().item())  # fmt: skip


def test_by_name():
    """Another backend has PyTorch's product, and so its bits."""
    drawn = Drawn((200,))
    assert_same(drawn.run(ours, backend="torch"), drawn.run(apart))
    assert_as_exact(drawn.run(ours, backend="reference"), drawn)


@pytest.mark.skipif(cpp_extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("tokens", [20, 200])
def test_one_step(tokens, monkeypatch):
    """The ordinary call, with gradients and without, is the extension's; without room for the pack it is not."""
    served = []

    class Spy:
        def ordinary_multi_lora(self, *arguments):
            found = cpp_extension().ordinary_multi_lora(*arguments)
            served.append((arguments[1] is not None, None if found is None else found[0]))
            return found

        def __getattr__(self, name):
            return getattr(cpp_extension(), name)

    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", Spy)
    drawn = Drawn((tokens,), torch.bfloat16)
    drawn.run(ours)
    with torch.no_grad():
        drawn.run(ours, ())
    assert served == [(True, False), (True, True)]
    extension = cpp_extension()
    extension.clear_packed()
    extension.set_packed_limit(0)
    try:
        assert_as_exact(drawn.run(ours), drawn)
    finally:
        extension.set_packed_limit(1 << 30)
    assert served[2:] == [(True, None), (False, False)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    drawn = Drawn((2, 70))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_as_exact(drawn.run(compiled), drawn)
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [10, 150])
def test_opcheck(tokens):
    drawn = Drawn((tokens,))
    x, a, b, scale = (drawn.leaves[name] for name in NAMES)
    rest = (drawn.plan.arrays, [drawn.ranks], [drawn.scaling], scale.reshape(-1), 0.3)
    seed, checks = torch.tensor([3]), ("test_schema", "test_faketensor")
    forward = (x, drawn.weight, drawn.bias, [a], [b], *rest, seed, "auto")
    torch.library.opcheck(multi_lora_linear_fwd.overload, forward, test_utils=checks)
    y, s = multi_lora_linear_fwd(*forward)
    assert y.shape == drawn.dy.shape
    for needs in itertools.product([False, True], repeat=4):
        backward = (drawn.dy, x, drawn.weight, [a], [b], s, *rest, seed, *needs, "auto")
        torch.library.opcheck(multi_lora_linear_bwd.overload, backward, test_utils=checks)


def test_nothing_is_differentiated_twice():
    drawn = Drawn((150,))
    x = drawn.leaves["x"].requires_grad_()
    (dx,) = torch.autograd.grad(ours(drawn, drawn.leaves), x, drawn.dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_gradcheck():
    drawn = Drawn((130,), torch.float64, sizes=(5, 4, 3))
    leaves = {k: t.requires_grad_() for k, t in drawn.leaves.items()}

    def function(*tensors):
        return ours(drawn, dict(zip(NAMES, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("tokens", [20, 200])
def test_errors(tokens):
    drawn = Drawn((tokens,))
    x, weight, bias = drawn.leaves["x"], drawn.weight, drawn.bias
    rest, keywords = drawn.arguments(drawn.leaves, {})

    def call(x=x, weight=weight, bias=bias, rest=rest):
        return PF.multi_lora_linear(x, weight, bias, *rest, **keywords)

    for expected, message, changed in (
        (TypeError, r"weight is a NoneType; expected .* \(out, in\)", {"weight": None}),
        (TypeError, "lora_a is a list; .*: one projection", {"rest": ([rest[0]], *rest[1:])}),
        (ValueError, rf"weight has shape \(53, 69\); .* in = {IN}", {"weight": weight[:, 1:]}),
        (
            ValueError,
            r"lora_b has shape .* out = 52 from weight",
            {"weight": weight[1:], "bias": None},
        ),
        (ValueError, r"bias has shape \(52,\)", {"bias": bias[1:]}),
        (TypeError, "weight has dtype torch.bfloat16", {"weight": weight.bfloat16()}),
        (ValueError, "plan", {"x": x[1:]}),
    ):
        for trained in (False, True):
            arguments = {"x": x.clone().requires_grad_(trained), **changed}
            with pytest.raises(expected, match=message):
                call(**arguments)


def test_explained():
    drawn = Drawn((200,))
    rest, keywords = drawn.arguments(drawn.leaves, {})
    call = (drawn.leaves["x"], drawn.weight, drawn.bias, *rest)
    found = pelt_fast.explain("multi_lora_linear", *call, **keywords)
    expected = "cpp" if cpp_extension() else "torch"
    assert found.backends == (expected, expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens(shape):
    drawn = Drawn(shape)
    for name, value in drawn.run(ours).items():
        assert value.numel() == 0 or not value.any(), name
