"""Prepared data: tokenized once, memory-mapped ever after."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data.cache import cache_key, new_cache
from torchspec_hpc.data.chat import Rendered
from torchspec_hpc.data.conversations import Conversation, read_conversations
from torchspec_hpc.data.masks import ChatEncoder
from torchspec_hpc.data.report import BadRow, DatasetReport, Rejection
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.errors import DataError
from torchspec_hpc.target.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_BATCH_ROWS = 256
_PROGRESS_S = 15.0
# x_0 has no hidden state before it and x_1 none that the first TTT step may use: supervision
# starts at x_2 (see the draft's contract, supervised token x_{t+2+i})
_FIRST_SUPERVISED = 2


class TokenDataset:
    """Samples of a prepared data file.

    Args:
        folder: Written by :func:`prepare_dataset`.

    Attributes:
        key: Names the content: equal keys, equal samples.
        report: What became of each row.
        input_ids: int32, all samples one after the other.
        loss_mask: bool, likewise.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        self.report = DatasetReport.read(folder / "report.json")
        self.input_ids: NDArray[np.int32] = np.load(folder / "input_ids.npy", mmap_mode="r")
        self.loss_mask: NDArray[np.bool_] = np.load(folder / "loss_mask.npy", mmap_mode="r")
        self._offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tokens = slice(self._offsets[index], self._offsets[index + 1])
        return Sample(index, np.array(self.input_ids[tokens]), np.array(self.loss_mask[tokens]))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, int32 ``[len]``."""
        return np.diff(self._offsets).astype(np.int32)


def prepare_dataset(
    path: str | Path,
    dataset: DatasetConfig,
    model: ModelConfig,
    max_seq_length: int,
    cache_dir: Path,
) -> TokenDataset:
    """Tokenizes a data file, or opens what an earlier call made of it.

    Any number of processes may call this at once, on a shared file system too: each writes its own
    directory, the first to finish gives it its name and the others use that one.

    Args:
        path: ``.jsonl``, ``.json`` or ``.parquet`` of conversations.
        dataset: How rows are read; its own paths are not looked at.
        model: Whose tokenizer and chat template count.
        max_seq_length: Tokens; longer samples keep their beginning.
        cache_dir: Prepared data go to a directory in it.

    Raises:
        ConfigError: No usable tokenizer or chat template.
        DataError: The file is unusable, has too many bad rows, or no good one.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"there is no data file {path}", hint="check the path in the dataset section"
        )
    encoder = ChatEncoder(load_tokenizer(model, dataset.chat_template), dataset.last_turn_loss_only)
    key = cache_key(
        path,
        fingerprint=encoder.fingerprint(),
        prompt_key=dataset.prompt_key,
        max_seq_length=max_seq_length,
        min_loss_tokens=dataset.min_loss_tokens,
    )
    folder = cache_dir / key
    if not folder.is_dir():
        _prepare(path, dataset, encoder, max_seq_length, folder)
    report = DatasetReport.read(folder / "report.json")
    logger.info("%s: %s", path, report.summary())
    _require_usable(report, dataset.max_rejected_share, path, folder / "report.json")
    return TokenDataset(folder)


def _prepare(
    path: Path, dataset: DatasetConfig, encoder: ChatEncoder, max_seq_length: int, folder: Path
) -> None:
    report = DatasetReport(loss_mask=encoder.description)
    started = reported = time.monotonic()
    with new_cache(folder) as writer:
        for line, ids, mask in _encode(path, dataset, encoder, report):
            kept = mask[:max_seq_length]
            if (said := int(kept[_FIRST_SUPERVISED:].sum())) < dataset.min_loss_tokens:
                report.rejected.append(Rejection(line, _too_few(said, len(ids), max_seq_length)))
                continue
            writer.append(ids[:max_seq_length], kept)
            report.num_samples += 1
            report.truncated += len(ids) > max_seq_length
            report.num_tokens += len(kept)
            report.num_supervised += said
            if time.monotonic() - reported > _PROGRESS_S:
                reported = time.monotonic()
                logger.info("preparing %s: %d rows so far", path, report.num_rows)
        report.rejected.sort()
        writer.publish(report)
    seconds = time.monotonic() - started
    logger.info("prepared in %.1f s, %.0f tokens/s", seconds, report.num_tokens / seconds)


def _encode(
    path: Path, dataset: DatasetConfig, encoder: ChatEncoder, report: DatasetReport
) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]:
    """Line, tokens and mask of every row that can be rendered; counts all rows."""
    rendered = _render(read_conversations(path, dataset.prompt_key), encoder, report)
    while batch := list(islice(rendered, _BATCH_ROWS)):
        tokens = encoder.tokenize([item for _, item in batch])
        for (line, _), (ids, mask) in zip(batch, tokens, strict=True):
            yield line, ids, mask


def _render(
    rows: Iterator[Conversation | Rejection], encoder: ChatEncoder, report: DatasetReport
) -> Iterator[tuple[int, Rendered]]:
    for row in rows:
        report.num_rows += 1
        if isinstance(row, Rejection):
            report.rejected.append(row)
            continue
        try:
            yield row.line, encoder.render(row.messages)
        except BadRow as error:
            report.rejected.append(Rejection(row.line, str(error)))


def _too_few(said: int, num_tokens: int, max_seq_length: int) -> str:
    if num_tokens > max_seq_length:
        return f"answer cut off: {said} supervised tokens in the first {max_seq_length}"
    return f"too few supervised tokens: {said}"


def _require_usable(
    report: DatasetReport, max_rejected_share: float, path: Path, report_file: Path
) -> None:
    if not report.num_rows:
        raise DataError(f"{path} has no rows", hint="check the path in the dataset section")
    rejected = f"{len(report.rejected)} of {report.num_rows} rows of {path} cannot be used"
    if report.num_samples and report.rejected_share <= max_rejected_share:
        if report.rejected:
            logger.warning("%s, see %s:\n%s", rejected, report_file, report.table())
        return
    share = f"dataset.max_rejected_share = {max_rejected_share:g} of the rows"
    raise DataError(
        f"{rejected}:\n{report.table()}",
        allowed=share if report.num_samples else "at least one good row",
        hint=f"every bad row and its reason is in {report_file}",
    )
