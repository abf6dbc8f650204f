from __future__ import annotations

import torch

from tests.services import Service
from tests.transfer.conftest import open_store
from torchspec_hpc.transfer.buffers import BufferPool
from torchspec_hpc.transfer.store import HiddenStateStore


def test_memory_comes_back_when_the_last_view_is_gone(trainer: HiddenStateStore) -> None:
    pool = BufferPool(trainer)
    tensor = pool.lend((100, 4, 64), torch.float32)
    address = tensor.data_ptr()
    view = tensor[:, :3].unsqueeze(0)
    del tensor
    other = pool.lend((100, 4, 64), torch.float32)
    assert other.data_ptr() != address
    del view
    again = pool.lend((10, 4, 64), torch.bfloat16)
    assert again.data_ptr() == address
    assert again.shape == (10, 4, 64)
    assert again.dtype == torch.bfloat16


def test_it_holds_no_more_buffers_than_were_lent_at_a_time(trainer: HiddenStateStore) -> None:
    pool, before = BufferPool(trainer), dict(trainer._registered)
    for num_tokens in (100, 5000, 200, 9000, 9000, 50, 12000):
        lent = [pool.lend((num_tokens + i, 4, 64), torch.float32) for i in range(3)]
        del lent
    ours = [buffer for at, (_, buffer) in trainer._registered.items() if at not in before]
    assert [buffer.nbytes for buffer in ours] == [12 * 1024**2] * 3
    assert [buffer.nbytes for buffer in (*pool._free, *pool._returned)] == [12 * 1024**2] * 3


def test_lent_memory_outlives_pool_and_store(master: Service) -> None:
    store = open_store(master)
    tensor = BufferPool(store).lend((1000, 4, 64), torch.float32).fill_(3)
    store.close()
    del store
    assert torch.equal(tensor, torch.full((1000, 4, 64), 3.0))


def test_registered_memory_is_not_freed_with_the_pool(trainer: HiddenStateStore) -> None:
    address = BufferPool(trainer).lend((1000, 4, 64), torch.float32).data_ptr()
    assert trainer._registered[address][1].data_ptr() == address
