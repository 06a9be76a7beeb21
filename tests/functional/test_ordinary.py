"""The short way of ordinary calls: the same results as the long way, and only where nothing is passed by."""

import contextlib
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.dispatch import ORDINARY, cpp_extension
from pelt_fast.testing.multi_lora_workloads import CASES, EVERYTHING, MultiLoRACase
from pelt_fast.testing.workloads import Adapter, Case

pytestmark = pytest.mark.skipif(cpp_extension() is None, reason="the C++ extension is not built")

D, M, R = 24, 8, 3
LORA, ADAPTER, MULTI = "ordinary_lora_linear", "ordinary_adapter", "ordinary_multi_lora"


class Spy:
    """The extension, counting the calls that it served as ordinary ones."""

    def __init__(self, extension):
        self._extension, self.served = extension, []

    def __getattr__(self, name):
        function = getattr(self._extension, name)
        if not name.startswith("ordinary"):
            return function

        def counted(*args):
            found = function(*args)
            if found is not None:
                self.served.append(name)
            return found

        return counted


@pytest.fixture
def served(monkeypatch):
    spy = Spy(cpp_extension())
    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: spy)
    return spy.served


@pytest.fixture
def long_way(monkeypatch):
    """Results of a call that takes the long way."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: None)
            return function(*args, **kwargs)

    return call


def lora(x, **kwargs):
    torch.manual_seed(1)
    w, a, b = torch.randn(D, x.shape[-1]), torch.randn(R, x.shape[-1]), torch.randn(D, R)
    return PF.lora_linear(x, w.to(x), None, a.to(x), b.to(x), 0.5, **kwargs)


def adapter(x, **kwargs):
    torch.manual_seed(1)
    d = x.shape[-1]
    down, up, norm = torch.randn(M, d), torch.randn(d, M), torch.randn(d)
    return PF.bottleneck_adapter(
        x, down.to(x), None, up.to(x), None, residual=x, ln_weight=norm.to(x), **kwargs
    )


def multi(x, **kwargs):
    torch.manual_seed(1)
    tokens = x[..., 0].numel()
    a, b = torch.randn(2, R, x.shape[-1]), torch.randn(2, D, R)
    plan = pelt_fast.MultiAdapterPlan([t % 3 - 1 for t in range(tokens)], 2)
    return PF.multi_lora(x, a.to(x), b.to(x), plan, 0.5, **kwargs)


def elementwise(x, **kwargs):
    scales = torch.ones(2, x.shape[-1])
    plan = pelt_fast.MultiAdapterPlan([t % 3 - 1 for t in range(x[..., 0].numel())], 2)
    return PF.multi_elementwise(x, scales.to(x), None, plan, **kwargs)


def bottleneck(x, **kwargs):
    torch.manual_seed(1)
    down, up, norm = torch.randn(2, M, x.shape[-1]), torch.randn(2, x.shape[-1], M), torch.ones(2)
    plan = pelt_fast.MultiAdapterPlan([t % 3 - 1 for t in range(x[..., 0].numel())], 2)
    weights = (down.to(x), None, up.to(x), None, plan)
    return PF.multi_bottleneck(x, *weights, residual=x, scaling=norm.to(x), **kwargs)


CALLS = {
    "lora": lora,
    "adapter": adapter,
    "multi": multi,
    "bottleneck": bottleneck,
    "elementwise": elementwise,
}


@pytest.fixture(params=CALLS)
def function(request):
    return CALLS[request.param]


def test_an_ordinary_call_is_served(function, served):
    function(torch.randn(2, 5, D))
    assert len(served) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "sliced"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_bitwise_as_the_long_way_lora(dtype, layout, grad, served, long_way):
    adapters = (Adapter(3, bias=True), Adapter(8, dropout_p=0.2))
    inputs = Case("", (2, 5), D, 40, adapters, x_layout=layout).make(dtype)
    assert_alike(PF.lora_linear, inputs, grad, long_way)
    assert LORA in served


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"skip": "x", "residual": ("x",)},
        {
            "residual": ("other",),
            "pre_ln": True,
            "post_ln": True,
            "gate": "sample",
            "scale": "channel",
        },
        {},
    ],
    ids=["a", "b", "c"],
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_bitwise_as_the_long_way_adapter(dtype, case, grad, served, long_way):
    torch.manual_seed(0)
    t = lambda *shape: torch.randn(*shape).to(dtype).requires_grad_(grad)
    x, other = t(2, 5, D), t(2, 5, D)
    arguments = (x, t(M, D), t(M), t(D, M), t(D))
    kwargs = {"activation": "gelu"}
    if "skip" in case:
        kwargs |= {"skip": other}
    if "residual" in case:
        kwargs |= {"residual": [x if name == "x" else other for name in case["residual"]]}
    if "pre_ln" in case:
        kwargs |= {"pre_ln_weight": t(D), "pre_ln_bias": t(D), "ln_weight": t(D), "eps": 1e-3}
        kwargs |= {"gate": t(2, 1, 1), "scaling": t(D)}
    outputs = []
    for way in (lambda f, *a, **k: f(*a, **k), long_way):
        y = way(PF.bottleneck_adapter, *arguments, **kwargs)
        leaves = [v for v in (*arguments, *kwargs.values()) if isinstance(v, torch.Tensor)]
        grads = torch.autograd.grad(y.square().sum(), leaves) if grad else ()
        outputs.append((y, *grads))
    assert ADAPTER in served
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("over", [False, True], ids=["alike", "float32 over a half"])
@pytest.mark.parametrize("given", ["scales", "biases", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bitwise_as_the_long_way_elementwise(dtype, given, over, served, long_way):
    x = torch.randn(2, 3, 2 * D, dtype=dtype)[..., ::2]
    wide = torch.promote_types(dtype, torch.float32) if over else dtype
    scales, biases = torch.randn(D, 4, dtype=wide).t(), torch.randn(4, D, dtype=dtype)
    args = [x, None if given == "biases" else scales, None if given == "scales" else biases]
    plan = pelt_fast.MultiAdapterPlan([3, -1, 0, 3, 9, 1], 4)
    y = PF.multi_elementwise(*args, plan)
    assert served == ["ordinary_multi_elementwise"]
    assert y.dtype is dtype
    assert torch.equal(y, long_way(PF.multi_elementwise, *args, plan))


@pytest.mark.parametrize("over", [False, True], ids=["alike", "float32 over a half"])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bitwise_as_the_long_way_bottleneck(dtype, optional, over, served, long_way):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32) if over else dtype
    x, other = (torch.randn(2, 3, 2 * D).to(dtype)[..., ::2] for _ in range(2))
    of = lambda *shape: torch.randn(*shape).to(wide) if optional else None
    plan = pelt_fast.MultiAdapterPlan([3, -1, 0, 3, 9, 1], 4)
    weights = [torch.randn(4, M, D).to(wide), of(4, M), torch.randn(4, D, M).to(wide), of(4, D)]
    kwargs = {"activation": "swish", "ln_weight": of(D), "ln_bias": of(D), "gate": of(2, 1, 1)}
    if optional:
        kwargs |= {"residual": (x, other), "scaling": of(4), "eps": 1e-3}
        kwargs |= {"widths": torch.tensor([3, M, 0, 99], dtype=torch.int32)}
    y = PF.multi_bottleneck(x, *weights, plan, **kwargs)
    assert served == ["ordinary_multi_bottleneck"]
    assert y.dtype is dtype
    assert torch.equal(y, long_way(PF.multi_bottleneck, x, *weights, plan, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["odd", "base_sliced", "qkv", "x_expanded", "one_dim", "all"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_bitwise_as_the_long_way_multi(dtype, name, grad, served, long_way):
    case = {c.name: c for c in CASES}.get(name) or MultiLoRACase("", (4, 9), D, **EVERYTHING)
    inputs = case.make(dtype)
    leaves = [
        t.requires_grad_(grad)
        for name, t in inputs.named_tensors()
        if name not in ("dy", "scaling")
    ]
    ranks = inputs.kwargs["ranks"] and [r.int() for r in inputs.kwargs["ranks"]]
    outputs = []
    for way in (lambda f, *a, **k: f(*a, **k), long_way):
        torch.manual_seed(3)
        y = torch.cat(way(PF.multi_lora, *inputs.args, **{**inputs.kwargs, "ranks": ranks}), -1)
        grads = torch.autograd.grad(y, leaves, inputs.dy, allow_unused=True) if grad else ()
        outputs.append((y, *grads))
    assert MULTI in served
    for ours, theirs in zip(*outputs, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
        assert ours is None or ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["odd", "base_sliced", "one_dim"])
def test_multi_changes_the_base_as_the_long_way_does(name, served, long_way):
    inputs = {c.name: c for c in CASES}[name].make(torch.float32)
    found = []
    for way in (lambda f, *a, **k: f(*a, **k), long_way):
        bases = [torch.empty_strided(b.shape, b.stride()).copy_(b) for b in inputs.base]
        versions = [b._version for b in bases]
        with torch.no_grad():
            out = way(PF.multi_lora, *inputs.args, **{**inputs.kwargs, "base_out": bases})
        assert all(a is b for a, b in zip(out, bases, strict=True))
        assert all(b._version > v for b, v in zip(bases, versions, strict=True))
        found.append(bases)
    assert served == [MULTI]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_multi_with_shared_memory_goes_the_long_way(served):
    """Whether what is changed overlaps what is read is decided in Python."""
    with torch.no_grad():
        buffer = torch.randn(3, 2 * D)
        multi(buffer[:, :D], base_out=buffer[:, D:])
        x = torch.randn(3, D)
        multi(x, base_out=x)
        multi(x, base_out=torch.randn(3, D).t().contiguous().t())
        with pytest.raises(ValueError, match="expanded"):
            multi(x, base_out=torch.zeros(1, D).expand(3, D))
    assert not served


def test_a_plan_that_changes_before_the_backward_is_an_error(served):
    plan = pelt_fast.MultiAdapterPlan([0, 1, -1], 2)
    a, b = torch.randn(2, R, D, requires_grad=True), torch.randn(2, D, R)
    y = PF.multi_lora(torch.randn(3, D), a, b, plan, 1.0)
    assert served == [MULTI]
    plan.update_([1, 1, 0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def assert_alike(function, inputs, grad, long_way):
    args = inputs.args
    flat = torch.utils._pytree.tree_leaves(args)
    leaves = [t for t in flat if isinstance(t, torch.Tensor)]
    weight = args[1]
    outputs = []
    for leaf in leaves:
        leaf.requires_grad_(grad and leaf is not weight)
    for way in (lambda f, *a, **k: f(*a, **k), long_way):
        torch.manual_seed(3)
        y = way(function, *args, **inputs.kwargs)
        wanted = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(y.square().sum(), wanted) if grad else ()
        outputs.append((y, *grads))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


class Sees(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_dispatch_mode_sees_the_operator(function, grad):
    x = torch.randn(3, D, requires_grad=grad)
    with Sees() as seen:
        function(x)
    assert any(name.startswith("pelt_fast::") for name in seen.names)
    with FlopCounterMode(display=False):
        function(x)


def test_the_profiler_sees_the_operator(function):
    with profile() as profiled:
        function(torch.randn(3, D))
    assert any("pelt_fast::" in event.name for event in profiled.function_events)


def test_not_in_the_way_of_others(function, served):
    """What is between the caller and the kernel goes the long way, or raises what it raised before."""
    x = torch.randn(3, D)
    with torch.autocast("cpu", torch.bfloat16):
        function(x)
    with contextlib.suppress(RuntimeError):
        torch.func.vmap(function)(x[None])
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # lists are not traced
        warnings.simplefilter("ignore")
        torch.jit.trace(function, (x,), check_trace=False)
    assert not served


def test_dual_tensors_are_not_ordinary(function, served):
    with fwAD.dual_level(), torch.no_grad():
        dual = fwAD.make_dual(torch.randn(3, D), torch.randn(3, D))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(RuntimeError, NotImplementedError):
                function(dual)
    assert not served


class Mine(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, D).as_subclass(Mine),
        torch.zeros(3, D, device="meta"),
        torch.randn(0, D),
        torch._neg_view(torch.randn(3, D)),
    ],
    ids=["subclass", "meta", "empty", "negated"],
)
def test_other_tensors_are_not_ordinary(function, x, served):
    with contextlib.suppress(ValueError, TypeError, RuntimeError, NotImplementedError):
        function(x)
    assert not served


@pytest.mark.parametrize("way", ["argument", "block"])
def test_only_for_our_backend(function, way, served):
    x = torch.randn(3, D)
    if way == "argument":
        function(x, backend="torch")
    else:
        with pelt_fast.use_backend("reference"):
            function(x)
    assert not served


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_served_only_where_the_dispatcher_would_choose_cpp(tokens, dtype, inference, served):
    with torch.inference_mode(inference):
        w, a, b = (torch.randn(s, dtype=dtype) for s in ((D, D), (R, D), (D, R)))
    x = torch.randn(tokens, D, dtype=dtype)
    chosen, _ = PF.explain("lora_linear", x, w, None, a, b, 1.0).backends
    PF.lora_linear(x, w, None, a, b, 1.0)
    assert bool(served) == (chosen == "cpp")


@pytest.mark.parametrize("residual", [None, "x"], ids=["alone", "beside x"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_none_among_the_residuals_is_named(residual, skip):
    """Nothing is read where no tensor is: the process went with it."""
    x = torch.randn(3, D)
    residuals = [None] if residual is None else [x, None]
    with pytest.raises(TypeError, match=r"residual(\[\d\])? is a NoneType"):
        PF.bottleneck_adapter(
            *(x, torch.randn(M, D), None, torch.randn(D, M), None),
            residual=residuals,
            skip=x.clone() if skip else None,
        )


def test_backward_with_a_gradient_that_is_not_ordinary():
    """A sparse gradient, and saved tensors that hooks gave back in another form."""
    torch.manual_seed(0)
    w, a = torch.randn(D, D), torch.randn(R, D, requires_grad=True)
    b = torch.randn(D, R, requires_grad=True)
    x = torch.randn(5, D)
    index = torch.zeros(1, D, dtype=torch.long)
    y = PF.lora_linear(x, w, None, a, b, 1.0)
    sparse = torch.autograd.grad(torch.gather(y, 0, index, sparse_grad=True).sum(), (a, b))
    y = PF.lora_linear(x, w, None, a, b, 1.0)
    dense = torch.autograd.grad(torch.gather(y, 0, index).sum(), (a, b))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        y = PF.lora_linear(x, w, None, a, b, 1.0)
    hooked = torch.autograd.grad(torch.gather(y, 0, index).sum(), (a, b))
    for s, d, h in zip(sparse, dense, hooked, strict=True):
        assert torch.equal(s, d)
        assert torch.equal(h, d)


def test_the_name_is_no_backend():
    with pytest.raises(ValueError, match="backend='ordinary'"):
        lora(torch.randn(3, D), backend=ORDINARY)
