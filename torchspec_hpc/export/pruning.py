"""A smaller draft vocabulary after training: chosen from data, cut out of the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.rundir import KEPT_IDS
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset
from torchspec_hpc.data.vocab import count_supervised, draft_vocabulary
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.target.spec import TargetSpec

_HEAD = "lm_head.weight"
#: Sizes whose coverage is shown; those below the target's vocabulary.
SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 48_000, 64_000, 96_000, 128_000)


@dataclass(frozen=True)
class CountedData:
    """The samples whose answers are counted; their tokens lie in the cache of training.

    Attributes:
        dataset: How rows are read; ``train_data_path`` is the file.
        model: Whose tokenizer counts: ``target_model_path``.
        max_seq_length: Tokens; longer samples keep their beginning.
        cache_dir: Where prepared data are, or will be.
    """

    dataset: DatasetConfig
    model: ModelConfig
    max_seq_length: int
    cache_dir: Path

    def open(self) -> TokenDataset:
        """Tokenizes, or takes what training with the same settings has tokenized."""
        return prepare_dataset(
            self.dataset.train_data_path,
            self.dataset,
            self.model,
            self.max_seq_length,
            self.cache_dir,
        )


def choose_vocabulary(
    data: CountedData, checkpoint: DraftCheckpoint, size: int
) -> NDArray[np.int64]:
    """The `size` tokens that answers use most, and those that end them; ascending ids.

    Raises:
        UserError: The draft's vocabulary is not whole.
    """
    _require_whole(checkpoint)
    spec = TargetSpec.from_path(data.model.target_model_path)
    specials = [i for i in (spec.bos_token_id, *spec.eos_token_ids) if i is not None]
    vocab_size = checkpoint.meta.draft["config"]["vocab_size"]
    return draft_vocabulary(data.open(), vocab_size, size, specials)


def prune(checkpoint: DraftCheckpoint, kept_ids: NDArray[np.int64]) -> DraftCheckpoint:
    """The same draft with fewer rows in its head.

    Args:
        checkpoint: Of a draft with the target's whole vocabulary.
        kept_ids: Target ids to keep, ascending.

    Raises:
        UserError: Its head was pruned before training.
    """
    _require_whole(checkpoint)
    draft = dict(checkpoint.meta.draft)
    if len(kept_ids) == draft["config"]["vocab_size"]:
        return checkpoint
    draft["config"] = draft["config"] | {"draft_vocab_size": len(kept_ids)}
    draft["kept_ids_file"] = KEPT_IDS
    tensors = _Pruned(checkpoint.tensors, torch.from_numpy(kept_ids))
    meta = replace(checkpoint.meta, draft=draft)
    return replace(checkpoint, meta=meta, tensors=tensors, kept_ids=kept_ids)


def _require_whole(checkpoint: DraftCheckpoint) -> None:
    if checkpoint.kept_ids is not None:
        raise UserError(
            f"the draft in {checkpoint.path} was trained with {len(checkpoint.kept_ids)} tokens",
            allowed="pruning of drafts that were trained with model.draft_vocab_size: null",
            hint="export it without --prune-vocab: it keeps the tokens it was trained with",
        )


class _Pruned(Mapping[str, torch.Tensor]):
    """Tensors of a draft, the head cut when it is looked up.

    Rows are taken by target id. (Not by ``d2t``, which holds offsets: the reference system's
    export takes wrong rows.)
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], kept_ids: torch.Tensor) -> None:
        self._tensors, self._kept_ids = tensors, kept_ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor[self._kept_ids] if name == _HEAD else tensor


@dataclass(frozen=True)
class Coverage:
    """What draft vocabularies of some sizes could say of the counted answers.

    Attributes:
        num_tokens: Supervised tokens that were counted.
        num_different: Different ones among them.
        vocab_size: V, the target's.
        by_size: Rows of the head, and the share of the tokens that they cover.
    """

    num_tokens: int
    num_different: int
    vocab_size: int
    by_size: tuple[tuple[int, float], ...]


def analyze(data: CountedData, vocab_size: int) -> Coverage:
    """Coverage of the answers by the most frequent tokens.

    Args:
        data: Is tokenized if it is not in the cache.
        vocab_size: V, the target's.
    """
    counts = np.sort(count_supervised(data.open(), vocab_size))[::-1]
    covered = counts.cumsum() / counts.sum()
    num_different = int((counts > 0).sum())
    sizes = sorted({*(s for s in SIZES if s < vocab_size), num_different, vocab_size})
    return Coverage(
        num_tokens=int(counts.sum()),
        num_different=num_different,
        vocab_size=vocab_size,
        by_size=tuple((size, float(covered[size - 1])) for size in sizes),
    )
