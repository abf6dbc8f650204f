"""Prepared data: tokenized once, read from shards ever after."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data.encode import (
    FIRST_SUPERVISED,
    SHARD_BYTES,
    SHARD_ROWS,
    Chunk,
    Preparation,
    encode_chunk,
    read_chunks,
    start_worker,
    work,
)
from torchspec_hpc.data.masks import ChatEncoder
from torchspec_hpc.data.report import REJECTED, DatasetReport, Rejection
from torchspec_hpc.data.shards import (
    COLUMNS,
    FORMAT_VERSION,
    INDEX,
    REPORT,
    Shard,
    TokenDataset,
    remove_leftovers,
    shard_path,
    write_index,
)
from torchspec_hpc.data.sources import dataset_key, files_of, signature
from torchspec_hpc.errors import ConfigError, DataError
from torchspec_hpc.target.files import model_file
from torchspec_hpc.target.spec import TargetSpec

__all__ = ["TokenDataset", "prepare_dataset", "require_usable"]

logger = logging.getLogger(__name__)

_PROGRESS_S = 15.0
#: Fewer shards are made here: starting processes would take longer than they save.
_WORTH_PROCESSES = 8


def prepare_dataset(
    path: str | Path,
    dataset: DatasetConfig,
    model: ModelConfig,
    max_seq_length: int,
    cache_dir: Path,
) -> TokenDataset:
    """Tokenizes a data set, or opens what an earlier call made of it.

    Any number of processes may call this at once, on a shared file system too: they make the same
    files. A call goes on where one that was killed stopped.

    Args:
        path: Data file, directory of them, or ``hf://`` reference.
        dataset: How rows are read; its own paths are not looked at.
        model: Whose tokenizer and chat template count.
        max_seq_length: Tokens; longer samples keep their beginning.
        cache_dir: Prepared data go to a directory in it.

    Raises:
        ConfigError: No usable tokenizer or chat template, or the cache cannot be written.
        DataError: The data are unusable, have too many bad rows, or no good one.
    """
    files = files_of(str(path))
    before = [signature(file) for file in files]
    vocab_size = _vocab_size(model.target_model_path)
    job = Preparation(files, dataset, model, max_seq_length, cache_dir, vocab_size)
    encoder = job.encoder()
    key = dataset_key(
        files,
        cache_dir,
        version=FORMAT_VERSION,
        shard=[SHARD_ROWS, SHARD_BYTES],
        fingerprint=encoder.fingerprint(),
        prompt_key=dataset.prompt_key,
        max_seq_length=max_seq_length,
        vocab_size=vocab_size,
        min_loss_tokens=dataset.min_loss_tokens,
        unique_ids=dataset.unique_ids,
    )
    folder = cache_dir / key
    if not (folder / INDEX).is_file():
        _prepare(replace(job, folder=folder), encoder)
        if [signature(file) for file in files] != before:
            shutil.rmtree(folder)
            raise DataError(
                f"{path} changed while it was read", hint="wait until it is written, and try again"
            )
    prepared = TokenDataset(folder)
    logger.info("%s: %s", path, prepared.report.summary())
    require_usable(prepared, dataset.max_rejected_share, str(path))
    return prepared


def _vocab_size(model_path: str) -> int | None:
    """Tokens that the target knows; None where there is a tokenizer alone."""
    has_config = model_file(model_path, "config.json") is not None
    return TargetSpec.from_path(model_path).vocab_size if has_config else None


def _prepare(job: Preparation, encoder: ChatEncoder) -> None:
    started = time.monotonic()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache directory {job.folder.parent}: {error.strerror}",
            hint="set cache_dir to a directory on a disk that every node can write",
        ) from error
    try:
        num_shards = _make_shards(job, encoder)
    except DataError:
        shutil.rmtree(job.folder)  # the data must change before they can be prepared
        raise
    report = _publish(job, num_shards, encoder.description)
    seconds = time.monotonic() - started
    logger.info("prepared in %.1f s, %.0f tokens/s", seconds, report.num_tokens / seconds)


def _make_shards(job: Preparation, encoder: ChatEncoder) -> int:
    """Makes the shards that are missing; returns how many there are then."""
    seen = 0

    def missing() -> Iterator[Chunk]:
        nonlocal seen
        for chunk in read_chunks(job.files):
            seen += 1
            if not shard_path(job.folder, chunk.number).is_file():
                yield chunk

    chunks = missing()
    first = list(islice(chunks, _WORTH_PROCESSES))
    num_workers = job.dataset.num_prepare_workers or len(os.sched_getaffinity(0))
    if len(first) < _WORTH_PROCESSES or num_workers == 1:
        for chunk in _both(first, chunks):
            encode_chunk(job, encoder, chunk)
        return seen
    # not fork: a trainer has threads that may hold locks. What takes seconds is imported once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, "transformers.models.auto.tokenization_auto"])
    arguments = (job, logger.getEffectiveLevel())
    with ProcessPoolExecutor(num_workers, context, start_worker, arguments) as pool:
        _run(_both(first, chunks), lambda chunk: pool.submit(work, chunk), 2 * num_workers)
    return seen


def _both(first: list[Chunk], rest: Iterator[Chunk]) -> Iterator[Chunk]:
    while first:
        yield first.pop(0)
    yield from rest


def _run(chunks: Iterator[Chunk], submit: Callable[[Chunk], Future[int]], ahead: int) -> None:
    """Keeps so many chunks in memory, and says now and then how far it is."""
    running: deque[Future[int]] = deque()
    num_rows, reported = 0, time.monotonic()
    for chunk in chunks:
        running.append(submit(chunk))
        if len(running) >= ahead:
            num_rows += running.popleft().result()
        if time.monotonic() - reported > _PROGRESS_S:
            reported = time.monotonic()
            logger.info("preparing: %d rows so far", num_rows)
    for future in running:
        future.result()


def _publish(job: Preparation, num_shards: int, loss_mask: str) -> DatasetReport:
    """Makes a data set of the shards."""
    folder = job.folder
    report = DatasetReport(loss_mask=loss_mask, files=[str(path) for path in job.files])
    shards = [Shard(shard_path(folder, number)) for number in range(num_shards)]
    columns = {
        name: np.concatenate([np.zeros(0, dtype), *(shard.column(name) for shard in shards)])
        for name, dtype in COLUMNS.items()
    }
    sizes = [len(shard.column("length")) for shard in shards]
    columns["shard"] = np.repeat(np.arange(num_shards, dtype=np.int32), sizes)
    columns["start"] = _starts(columns["length"], sizes)
    kept, duplicates = _without_duplicates(columns, job)
    temporary = folder / f".{REJECTED}.{os.uname().nodename}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        for shard in shards:
            num_rows, rejected = shard.rows()
            report.num_rows += num_rows
            for rejection in rejected:
                report.reject(rejection)
                file.write(json.dumps(rejection._asdict()) + "\n")
        for rejection in duplicates:
            report.reject(rejection)
            file.write(json.dumps(rejection._asdict()) + "\n")
    temporary.replace(folder / REJECTED)
    columns = {name: values[kept] for name, values in columns.items()}
    _count(report, columns)
    report.write(folder / REPORT)
    write_index(folder, columns)
    remove_leftovers(folder)
    return report


def _starts(lengths: NDArray[np.int32], sizes: list[int]) -> NDArray[np.int64]:
    """First token of each sample within its shard."""
    ends = np.cumsum(lengths, dtype=np.int64)
    firsts = np.cumsum([0, *sizes])[:-1]  # sample with which each shard begins
    before = np.append(0, ends)[firsts]  # tokens of earlier shards
    starts: NDArray[np.int64] = ends - lengths - np.repeat(before, sizes)
    return starts


def _without_duplicates(
    columns: dict[str, NDArray[Any]], job: Preparation
) -> tuple[NDArray[np.bool_], list[Rejection]]:
    """Samples to keep: the first one of each id, and all without one."""
    ids = columns["id_hash"]
    kept = np.ones(len(ids), dtype=np.bool_)
    if not job.dataset.unique_ids:
        return kept, []
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    kept = (first[inverse] == np.arange(len(ids))) | (ids == 0)
    rejected = []
    for index in np.flatnonzero(~kept):
        file, line = (int(columns[name][index]) for name in ("file", "line"))
        earlier = first[inverse[index]]
        where = f"{job.files[columns['file'][earlier]].name} line {columns['line'][earlier]}"
        reason = f"duplicate id: it was in {where}; dataset.unique_ids=false keeps both"
        rejected.append(Rejection(str(job.files[file]), line, reason))
    return kept, rejected


def _count(report: DatasetReport, columns: dict[str, NDArray[Any]]) -> None:
    length, said = columns["length"], columns["supervised"]
    report.num_samples = len(length)
    report.truncated = int((columns["full_length"] > length).sum())
    report.changed_answers = int(columns["changed"].sum())
    report.num_tokens, report.num_supervised = int(length.sum()), int(said.sum())
    report.num_text = int(columns["is_text"].sum())
    report.num_all_supervised = int(
        ((said == length - FIRST_SUPERVISED) & ~columns["is_text"]).sum()
    )


def require_usable(prepared: TokenDataset, max_rejected_share: float, path: str) -> None:
    """Checks what became of the rows.

    Args:
        prepared: Data set.
        max_rejected_share: Of its rows.
        path: As the user named it.

    Raises:
        DataError: It has no rows, too many bad ones or no good one, or a mask of ones.
    """
    report, folder = prepared.report, prepared.folder
    if not report.num_rows:
        raise DataError(f"{path} has no rows", hint="check the path in the dataset section")
    if report.num_samples and report.num_all_supervised == report.num_samples - report.num_text > 0:
        raise DataError(
            f"the loss mask of {path} is true for every token of every sample",
            allowed="a mask that is true where the assistant speaks",
            hint="check loss_mask, or give rows of text as a column called text",
        )
    if report.changed_answers:
        logger.warning(
            "%d earlier answers are shown otherwise than they were given and not supervised: the "
            "chat template changes history",
            report.changed_answers,
        )
    rejected = f"{report.num_rejected} of {report.num_rows} rows of {path} cannot be used"
    if report.num_samples and report.rejected_share <= max_rejected_share:
        if report.rejected:
            logger.warning("%s, see %s:\n%s", rejected, folder / REJECTED, report.table())
        return
    share = f"dataset.max_rejected_share = {max_rejected_share:g} of the rows"
    raise DataError(
        f"{rejected}:\n{report.table()}",
        allowed=share if report.num_samples else "at least one good row",
        hint=f"every bad row and its reason is in {folder / REJECTED}",
    )
