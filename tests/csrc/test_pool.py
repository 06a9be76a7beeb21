"""Memory of large results: kept when they are freed, given to the next, and never to two at once."""

import os
import signal
import threading

import pytest
import torch

from pelt_fast import functional as PF

T, D = 1100, 256  # over a MiB in fp32
BYTES = T * D * 4
KEPT = (BYTES + 4095) // 4096 * 4096


@pytest.fixture(autouse=True)
def empty_pool(cpp):
    cpp.clear_pool()
    yield
    cpp.set_pool_limit(1 << 30)
    cpp.clear_pool()


def call(rows=T, value=1.0):
    x, weight = torch.full((rows, D), value), torch.eye(D)
    a, b = torch.zeros(1, D), torch.zeros(D, 1)
    return PF.lora_linear(x, weight, None, a, b, 1.0, backend="cpp")


def test_freed_memory_is_used_again(cpp):
    y = call()
    assert cpp.pooled_bytes() == 0
    address = y.data_ptr()
    del y
    assert cpp.pooled_bytes() == KEPT
    again = call(value=2.0)
    assert again.data_ptr() == address
    assert cpp.pooled_bytes() == 0
    assert (again == 2).all()


def test_what_is_still_seen_is_not_given_out():
    y = call()
    corner, address = y[-1, -1], y.data_ptr()
    del y
    other = call(value=3.0)
    assert other.data_ptr() != address
    assert corner == 1


def test_a_block_is_not_much_larger_than_what_it_is_for(cpp):
    large = call(rows=4 * T)
    del large
    kept = cpp.pooled_bytes()
    y = call()
    assert cpp.pooled_bytes() == kept
    del y
    slightly_smaller = call(rows=T - T // 32)
    assert cpp.pooled_bytes() == kept
    del slightly_smaller


def test_small_results_are_none_of_its_business(cpp):
    y = call(rows=8)
    del y
    assert cpp.pooled_bytes() == 0


def test_limit(cpp):
    cpp.set_pool_limit(0)
    y = call()
    del y
    assert cpp.pooled_bytes() == 0
    cpp.set_pool_limit(2 * KEPT)
    three = [call(value=float(i)) for i in range(3)]
    last = three[2].data_ptr()
    three.clear()
    assert cpp.pooled_bytes() == 2 * KEPT
    cpp.set_pool_limit(KEPT)
    assert cpp.pooled_bytes() == KEPT
    cpp.clear_pool()
    assert cpp.pooled_bytes() == 0
    assert call().shape == (T, D)
    assert last


def test_results_are_ordinary_tensors(cpp):
    y = call()
    y.resize_(T // 2, D)
    y.untyped_storage().resize_(0)
    y.untyped_storage().resize_(BYTES)
    y.add_(1)
    z = call().share_memory_()
    assert (z == 1).all()
    y.set_()
    del y


def test_every_element_of_memory_that_is_used_again_is_written(cpp):
    y = call()
    del y
    x = torch.ones(T, D)
    down, up = torch.zeros(1, D), torch.zeros(D, 1)
    out = PF.bottleneck_adapter(x, down, None, up, None, residual=x, backend="cpp")
    assert torch.equal(out, x)


def test_threads_share_it(cpp):
    wrong = []

    def work(value):
        wrong.extend(value for _ in range(20) if not (call(value=value) == value).all())

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cpp.pooled_bytes() <= 4 * KEPT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_forks_while_threads_allocate():
    """A lock that another thread held at that moment would be held for ever in the child."""
    done = threading.Event()

    def work():
        while not done.is_set():
            call()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a child that hangs dies of it
                os._exit(0 if (call(value=4.0) == 4).all() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()
