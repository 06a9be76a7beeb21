"""`torch.compile(fullgraph=True)`, forward and backward, other numbers of tokens without a new compilation."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CASES = {
    "one": MultiLoRACase("", (2, 3), 24, rank=(30,), row_scale="token", dropout_p=0.25),
    "everything": MultiLoRACase("", (2, 3), 24, **{**EVERYTHING, "rank": (30, 3, 17)}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def not_the_reference(backend):
    if backend.name == "reference":
        pytest.skip("the graph is the same as the others', and the reference goes row by row")


def compiled_layer(backend, compiler, options):
    """The layer between operations that a compiler may fuse, plain and compiled."""

    def layer(x, lora_a, lora_b, plan, scaling, **more):
        y = PF.multi_lora(x * 2, lora_a, lora_b, plan, scaling, **more, backend=backend.name)
        return [torch.relu(t) for t in y]

    return layer, torch.compile(layer, fullgraph=True, backend=compiler, **options)


def results_of(function, inputs, seed=0):
    args, more = inputs.args, inputs.kwargs

    def call(leaves):
        torch.manual_seed(seed)
        parts = {"base_out": leaves.base, "row_scale": leaves.row_scale}
        y = function(leaves.x, leaves.lora_a, leaves.lora_b, *args[3:], **{**more, **parts})
        return oracle.joined(y)

    return oracle.run(call, inputs)


@pytest.mark.parametrize("case", ["one", pytest.param("everything", marks=pytest.mark.slow)])
def test_same_results_for_every_number_of_tokens_from_one_graph(case, backend, device):
    backend.require(CASES[case].make(torch.float32, device))
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = compiled_layer(backend, counter, {"dynamic": True})
    compilations = []
    # no size twice, nor the number of tiles: the compiler takes equal sizes for one and the same
    for tokens in (9, 25):
        inputs = replace(CASES[case], shape=(2, tokens)).make(torch.float32, device)
        expected, found = (results_of(function, inputs) for function in (plain, compiled))
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_other_adapters_in_the_same_plan_need_no_compilation(backend, device):
    case = CASES["one"]
    inputs = case.make(torch.float32, device)
    backend.require(inputs)
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = compiled_layer(backend, counter, {})
    plan = MultiAdapterPlan([-1] * 6, case.adapters, device=device)
    inputs = replace(inputs, plan=plan)
    for ids in ([0] * 6, [2, -1, 2, 1, 9, 0], [-1] * 6):
        plan.update_(ids)
        expected, found = (results_of(function, inputs) for function in (plain, compiled))
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
    assert counter.frame_count == 1


@pytest.mark.slow
def test_without_gradients_the_result_is_the_same(backend, device):
    inputs = CASES["everything"].make(torch.float32, device)
    backend.require(inputs)
    plain, compiled = compiled_layer(backend, "aot_eager", {})
    with torch.no_grad():
        found = results_of_call(compiled, inputs)
        expected = results_of_call(plain, inputs)  # changes the bases
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def results_of_call(function, inputs):
    torch.manual_seed(0)
    return function(*inputs.args, **inputs.kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor(case, backend, device):
    backend.require(CASES[case].make(torch.float32, device))
    plain, compiled = compiled_layer(backend, "inductor", {"dynamic": True})
    with torch._inductor.config.patch(fallback_random=True):  # torch's own draws, not inductor's
        for tokens in (6, 11):
            inputs = replace(CASES[case], shape=(2, tokens)).make(torch.float32, device)
            expected, found = (results_of(function, inputs) for function in (plain, compiled))
            for name, value in expected.items():
                torch.testing.assert_close(value, found[name])
