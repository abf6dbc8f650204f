from __future__ import annotations

import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchspec_hpc.config import Config, parse_config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.state_cache import StateCache, name_of


def config(target: Path, folder: Path, **inference: object) -> Config:
    raw: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"target_model_path": str(target)},
        "dataset": {"train_data_path": "train.jsonl"},
        "inference": {"engine": "hf", **inference},
    }
    return parse_config(raw, base_dir=folder, source="test")


def cache(target: Path, folder: Path, layers: tuple[int, ...] = (1, 2), **inference: object):
    spec = TargetSpec.from_path(str(target))
    return StateCache(config(target, folder, **inference), spec, layers, "cpu")


def sample(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def states(seed: int, length: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 3, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_written_is_read(tiny_target: Path, tmp_path: Path, dtype: torch.dtype):
    kept = cache(tiny_target, tmp_path)
    assert kept.read(sample(1, 2, 3)) is None
    assert not kept.holds(sample(1, 2, 3))
    expected = states(0, 3, dtype)
    kept.write(sample(1, 2, 3), expected)
    found = cache(tiny_target, tmp_path).read(sample(1, 2, 3))
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert kept.read(sample(1, 2, 4)) is None
    assert kept.read(sample(1, 2)) is None
    assert json.loads((kept.folder / "about.json").read_text())["layers"] == [1, 2, 4]
    assert kept.holds(sample(1, 2, 3))
    assert kept.names() == {name_of(sample(1, 2, 3))}
    assert len(list(kept.folder.rglob("*"))) == 3  # nothing temporary is left


def test_what_killed_writers_left_behind_is_removed(tiny_target: Path, tmp_path: Path):
    kept = cache(tiny_target, tmp_path)
    kept.write(sample(1), states(0, 1))
    (file,) = kept.folder.glob("*/*")
    old, fresh = (file.with_name(f".{file.name}.node.{pid}") for pid in (1, 2))
    old.write_text("half")
    fresh.write_text("half")
    os.utime(old, (1, 1))
    assert kept.names() == {file.stem}
    assert not old.exists()
    assert fresh.exists()


def test_what_is_there_is_not_replaced(tiny_target: Path, tmp_path: Path):
    """On NFS that would end a process that has it mapped."""
    kept = cache(tiny_target, tmp_path)
    kept.write(sample(1), states(0, 1))
    (file,) = kept.folder.glob("*/*")
    inode = file.stat().st_ino
    kept.write(sample(1), states(0, 1))
    assert file.stat().st_ino == inode


def test_two_writers_of_one_sample_do_not_meet(tiny_target: Path, tmp_path: Path):
    kept = cache(tiny_target, tmp_path)
    expected = states(0, 2000)
    with ThreadPoolExecutor(4) as threads:
        writes = [threads.submit(kept.write, sample(1), expected) for _ in range(20)]
        while not all(write.done() for write in writes):
            found = kept.read(sample(1))
            assert found is None or torch.equal(found, expected)
    assert torch.equal(kept.read(sample(1)), expected)
    assert len(list(kept.folder.glob("*/*"))) == 1


@pytest.mark.parametrize(
    ("dtype", "device", "item_bytes"),
    [("auto", "auto", 4), ("auto", "cuda", 4), ("bfloat16", "auto", 2), ("float16", "cpu", 2)],
)
def test_bytes_of_a_token(tiny_target: Path, tmp_path: Path, dtype, device, item_bytes: int):
    kept = cache(tiny_target, tmp_path, dtype=dtype, device=device)
    assert kept.token_bytes == 3 * 64 * item_bytes


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "no tensors"])
def test_a_damaged_or_foreign_file_is_not_used(
    tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
):
    kept = cache(tiny_target, tmp_path)
    kept.write(sample(1, 2, 3), states(0, 3))
    (file,) = kept.folder.glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-20])
    elif damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        kept.write(sample(4, 5, 6), states(1, 3))
        (other,) = set(kept.folder.glob("*/*.safetensors")) - {file}
        shutil.copy(other, file)
    else:
        file.write_bytes(b"states")
    assert kept.read(sample(1, 2, 3)) is None
    assert f"{file} is damaged and removed" in caplog.text
    assert not kept.holds(sample(1, 2, 3))
    kept.write(sample(1, 2, 3), states(0, 3))
    assert torch.equal(kept.read(sample(1, 2, 3)), states(0, 3))


def test_the_key_covers_target_layers_engine_and_precision(tiny_target: Path, tmp_path: Path):
    target = tmp_path / "target"
    shutil.copytree(tiny_target, target)

    def folder(layers: tuple[int, ...] = (1, 2), **inference: object) -> Path:
        return cache(target, tmp_path, layers, **inference).folder

    same = folder()
    assert folder() == same
    assert folder(inference_batch_size=3, num_threads=2) == same
    others = [
        folder(layers=(1, 3)),
        folder(engine="vllm"),
        folder(engine="vllm", vllm={"extra_args": {"quantization": "fp8"}}),
        folder(engine="sglang", sglang={"extra_args": {"quantization": "fp8"}}),
        folder(dtype="bfloat16"),
        folder(batch_invariant=True),
        folder(device="cuda"),
    ]
    weights = target / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    others.append(folder())
    edited = (target / "config.json").read_text().replace("{", '{"more": 1, ', 1)
    (target / "config.json").write_text(edited)
    others.append(folder())
    assert len({same, *others}) == len(others) + 1


def test_a_cache_that_cannot_be_made_is_the_users_error(tiny_target: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write the cache directory"):
        cache(tiny_target, tmp_path)


def test_a_disk_that_fills_up_leaves_no_half_file(
    tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    kept = cache(tiny_target, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        kept.write(sample(1), states(0, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in caplog.text
    assert not list(kept.folder.glob("*/*"))


def test_a_full_disk_is_said_once_and_harms_nothing(
    tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    kept = cache(tiny_target, tmp_path)
    shutil.rmtree(kept.folder)  # as writes fail
    for index in range(3):
        kept.write(sample(1, 2, index), states(index, 3))
        assert kept.read(sample(1, 2, index)) is None
    (said,) = [record.message for record in caplog.records if "cannot write" in record.message]
    assert "this rank keeps no hidden states on disk" in said


def test_the_nearest_settings_are_named(tiny_target: Path, tmp_path: Path):
    wanted = cache(tiny_target, tmp_path)
    assert "holds no states of anything else" in wanted.nearest()
    cache(tiny_target, tmp_path, dtype="bfloat16")
    cache(tiny_target, tmp_path, layers=(1, 3), dtype="float16")
    assert wanted.nearest().endswith("other settings: dtype is bfloat16 and not float32")
