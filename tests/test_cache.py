"""Ragged buffers: what is committed is found again, whatever the rows' lengths."""

import pytest
import torch

from mmspec.cache import RaggedKV


def kv(batch=2, capacity=16):
    return RaggedKV(2, batch, 1, capacity, 1, torch.float64, torch.device("cpu"))


def fill(cache, row, values):
    cache.begin_prefill(row)
    for layer in range(2):
        x = torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1) + 100 * layer
        cache.write(layer, x, -x)
    cache.set_length(row, len(values))


def contents(cache, row, layer=0):
    return cache.data[layer, 0, row, 0, : cache.lengths[row], 0].tolist()


def tree_pass(cache, nodes):
    """One pass of [B, N] node values."""
    cache.begin_tree(len(nodes[0]))
    for layer in range(2):
        x = torch.tensor(nodes, dtype=torch.float64)[:, None, :, None] + 100 * layer
        cache.write(layer, x, -x)


def test_ragged_rows_keep_their_own_paths_in_all_layers():
    cache = kv()
    fill(cache, 0, [1, 2, 3])
    fill(cache, 1, [7])
    tree_pass(cache, [[10, 11, 12], [20, 21, 22]])
    cache.commit(torch.tensor([[0, 2, 0], [0, 1, 2]]), [(0, 2), (0, 1, 2)])
    assert contents(cache, 0) == [1, 2, 3, 10, 12]
    assert contents(cache, 1) == [7, 20, 21, 22]
    assert contents(cache, 1, layer=1) == [107, 120, 121, 122]
    assert cache.lengths == [5, 4] == cache.lengths_device.tolist()
    assert cache.data[0, 1, 1, 0, :4, 0].tolist() == [-7, -20, -21, -22]


def test_a_chain_in_one_row_is_committed_without_moving():
    cache = kv(batch=1)
    fill(cache, 0, [1, 2])
    tree_pass(cache, [[10, 11, 12]])
    before = cache.data.clone()
    cache.commit(torch.tensor([[0, 1, 2]]), [(0, 1)])
    assert torch.equal(before, cache.data)
    assert contents(cache, 0) == [1, 2, 10, 11]


def test_idle_rows_keep_nothing():
    cache = kv()
    fill(cache, 0, [1, 2])
    tree_pass(cache, [[10], [20]])
    cache.commit(torch.tensor([[0], [0]]), [(0,), ()])
    assert cache.lengths == [3, 0]


def test_append_to_ragged_rows():
    cache = kv()
    fill(cache, 0, [1, 2])
    fill(cache, 1, [5])
    x = torch.tensor([[8.0, 9.0], [6.0, 0.0]], dtype=torch.float64)[:, None, :, None]
    cache.append(0, x, -x, (2, 1))
    cache.advance((2, 1))
    assert contents(cache, 0) == [1, 2, 8, 9]
    assert contents(cache, 1) == [5, 6]


def test_overflow_is_refused():
    cache = kv(capacity=4)
    fill(cache, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="exceed the KV capacity of 4"):
        cache.begin_tree(2)


def test_memory_is_the_closed_form():
    assert kv(batch=3, capacity=10).nbytes == 2 * 2 * 3 * 1 * 10 * 1 * 8
