"""Large CPU buffers are used again when their tensors are gone, and not before."""

import threading

import pytest
import torch

from spo_kernels import empty_cache, memory
from spo_kernels.testing import DEVICE

SIZE = 1 << 20
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the buffers are the CPU's")


def buffer(size=SIZE):
    return memory.empty((size,), torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def empty():
    empty_cache()
    yield
    empty_cache()


def test_a_free_buffer_is_used_again():
    first = buffer()
    place = first.data_ptr()
    assert place % memory.ALIGNMENT == 0
    assert buffer().data_ptr() != place  # it is in use
    del first
    assert buffer(SIZE - 5).data_ptr() == place


def test_views_and_gradients_keep_a_buffer():
    leaf = torch.zeros(SIZE, requires_grad=True)
    leaf.grad = buffer()
    place = leaf.grad.data_ptr()
    view = leaf.grad[3:5]
    leaf.grad = None
    assert buffer().data_ptr() != place
    del view
    empty_cache()
    assert not memory._buffers


def test_other_sizes_let_the_free_ones_go():
    del [buffer()][0]
    assert len(memory._buffers) == 1
    for i in range(memory.PATIENCE):
        assert min(x.size for x in memory._buffers) < 8 * SIZE
        kept = buffer(3 * SIZE << i)
        assert kept.numel() == 3 * SIZE << i
    assert min(x.size for x in memory._buffers) > 8 * SIZE
    held = len(memory._buffers)
    small = buffer(8)
    assert small.numel() == 8 and len(memory._buffers) == held


def test_a_step_keeps_the_buffers_of_all_its_sizes():
    sizes, places = (2 * SIZE, SIZE // 2, 8 * SIZE), []
    for _ in range(3):
        places.append([])
        for size in sizes:  # each is free before the next is taken
            places[-1].append(buffer(size).data_ptr())
    assert places[0] == places[1] == places[2] and len(memory._buffers) == 3


def test_threads_never_share_a_buffer():
    seen, errors = set(), []
    lock = threading.Lock()

    def work(mark):
        for _ in range(50):
            mine = buffer()
            with lock:
                if mine.data_ptr() in seen:
                    errors.append(mine.data_ptr())
                seen.add(mine.data_ptr())
            mine[::4096] = mark
            if not mine[::4096].eq(mark).all():
                errors.append(mark)
            with lock:
                seen.discard(mine.data_ptr())
            del mine

    threads = [threading.Thread(target=work, args=(mark,)) for mark in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
