"""A tiny draft, in memory and as a run's checkpoint on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.config.rundir import KEPT_IDS
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.export.checkpoint import DraftCheckpoint

CONFIG = Eagle3Config(
    hidden_size=64,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=512,
    draft_vocab_size=12,
    aux_layers=(1, 3, 4),
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
KEPT = np.arange(1, 40, 3)[:12]
STREAM = {"dataset": "abc", "num_samples": 3, "seed": 0}


def make_checkpoint(target: str, kept_ids: np.ndarray | None = KEPT) -> DraftCheckpoint:
    """Random weights of step 7; kept_ids None: the whole vocabulary."""
    config = json.loads(json.dumps(CONFIG.to_dict()))
    kept = None
    if kept_ids is None:
        config["draft_vocab_size"] = CONFIG.vocab_size
    else:
        kept = torch.from_numpy(kept_ids)
    shape = Eagle3Config.from_dict(config)
    draft = Eagle3Draft(shape, torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size), kept)
    tensors = {name: torch.rand_like(p) for name, p in draft.named_parameters()}
    described = {"config": config, "kept_ids_file": None if kept_ids is None else KEPT_IDS}
    meta = CheckpointMeta(7, 28, described, target=target, stream=STREAM, world_size=1)
    return DraftCheckpoint(Path("step_7"), meta, tensors, kept_ids)


@pytest.fixture
def checkpoint() -> DraftCheckpoint:
    return make_checkpoint("target")


RunWriter = Callable[[DraftCheckpoint], Path]


@pytest.fixture
def write_run(tmp_path: Path) -> RunWriter:
    """Writes a checkpoint as a run does; returns the run."""

    def write(checkpoint: DraftCheckpoint) -> Path:
        folder = tmp_path / "run" / "checkpoints" / "step_7"
        folder.mkdir(parents=True)
        state = {"model": dict(checkpoint.tensors), "optimizer": {"step": torch.zeros(3)}}
        save(state, checkpoint_id=folder, no_dist=True)
        if checkpoint.kept_ids is not None:
            np.save(folder / KEPT_IDS, checkpoint.kept_ids)
        checkpoint.meta.write(folder)
        (folder.parent / "latest").write_text("step_7\n")
        return tmp_path / "run"

    return write
