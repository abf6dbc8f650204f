"""Trainers that keep what the engines answered: torchrun, two ranks, real services."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.conftest import MakeRun
from tests.training.producer import Producer
from torchspec_hpc.transfer.messages import Request

pytestmark = pytest.mark.slow

#: The tiny target in float32: 3 aux layers and the last one, 64 wide.
TOKEN_BYTES = 4 * 64 * 4


def test_no_more_is_kept_than_the_bound(make_run: MakeRun, engine: Producer, tmp_path: Path):
    asked: list[bytes] = []
    engine.on_request = lambda request: note(request, asked)

    def train(name: str, **inference: object) -> list[dict[str, object]]:
        asked.clear()
        kept = {"cache_dir": str(tmp_path / "states"), **inference}
        run = make_run(name, inference=kept, micro_batch_size=2, num_train_steps=4)
        assert run.train(num_ranks=2) == 0
        return run.learning()

    first = train("first", cache_max_bytes=TOKEN_BYTES * 400)
    assert len(asked) == 16
    files = {path.stem: path.stat().st_size for path in tmp_path.glob("states/*/*/*.safetensors")}
    assert 0 < len(files) < 16
    assert sum(files.values()) < TOKEN_BYTES * 400 + 1000 * len(files)  # and a header each

    assert train("second") == first
    assert len(asked) == 16 - len(files)
    assert train("third", inference_num_gpus=0) == first
    assert not asked


def note(request: Request, asked: list[bytes]) -> None:
    asked.append(request.token_ids)
