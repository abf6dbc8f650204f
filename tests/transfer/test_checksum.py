"""The checksum finds what may happen to an object."""

from __future__ import annotations

import pytest
import torch

from torchspec_hpc.transfer.checksum import checksum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 300])
def test_it_depends_on_every_part(dtype: torch.dtype, num_tokens: int) -> None:
    states = torch.randn(num_tokens, 4, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = checksum(states)
    assert right == checksum(states.clone())
    data = states.view(-1).view(torch.uint8)
    for at in range(0, data.numel(), 97):
        data[at] ^= 16
        assert checksum(states) != right
        data[at] ^= 16
    assert checksum(states[:-1]) != right
    assert checksum(torch.cat([states, states[:1]])) != right


def test_it_knows_the_order_of_blocks() -> None:
    states = torch.randn(4, 1024)
    assert checksum(states) != checksum(states.flip(0).contiguous())


def test_it_reads_from_any_address() -> None:
    data = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
    assert checksum(data[3:9000]) == checksum(data[3:9000].clone())
