"""Some rows of a data set as a shard: the work that all cores share."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data.chat import Rendered
from torchspec_hpc.data.conversations import Tokens, parse_row
from torchspec_hpc.data.masks import ChatEncoder
from torchspec_hpc.data.messages import plain_text
from torchspec_hpc.data.report import BadRow, Rejection
from torchspec_hpc.data.rows import Row, read_rows, value_of
from torchspec_hpc.data.shards import Encoded, shard_path, write_shard
from torchspec_hpc.target.tokenizer import load_tokenizer

# x_0 has no hidden state before it and x_1 none that the first TTT step may use: supervision
# starts at x_2 (see the draft's contract, supervised token x_{t+2+i})
FIRST_SUPERVISED = 2
#: Rows of a shard: of these and of these bytes of JSON, what is reached first.
SHARD_ROWS, SHARD_BYTES = 4096, 1 << 25
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Preparation:
    """All that a process needs to know to make shards.

    Attributes:
        files: Of the data set.
        dataset: How rows are read.
        model: Whose tokenizer and chat template count.
        max_seq_length: Tokens; longer samples keep their beginning.
        folder: Where shards go.
        vocab_size: Of the target; None if it has no ``config.json`` that says so.
    """

    files: list[Path]
    dataset: DatasetConfig
    model: ModelConfig
    max_seq_length: int
    folder: Path
    vocab_size: int | None

    def encoder(self) -> ChatEncoder:
        """The target's tokenizer and its chat template."""
        return ChatEncoder(load_tokenizer(self.model, self.dataset.chat_template), self.dataset)


class Chunk(NamedTuple):
    """The rows of one shard, each with the index of its file."""

    number: int
    rows: list[tuple[int, Row]]


def read_chunks(files: list[Path]) -> Iterator[Chunk]:
    """All rows in order, shard by shard."""
    number, rows, num_bytes = 0, [], 0
    for index, path in enumerate(files):
        for row in read_rows(path):
            rows.append((index, row))
            num_bytes += row.num_bytes
            if len(rows) == SHARD_ROWS or num_bytes >= SHARD_BYTES:
                yield Chunk(number, rows)
                number, rows, num_bytes = number + 1, [], 0
    if rows:
        yield Chunk(number, rows)


class Item(NamedTuple):
    """A good row, before or after it is tokenized."""

    file: int
    line: int
    id_hash: int
    content: Rendered | Tokens


def encode_chunk(job: Preparation, encoder: ChatEncoder, chunk: Chunk) -> int:
    """Writes the shard of some rows; returns their number."""
    rejected: list[tuple[int, int, str]] = []  # file, line, reason
    samples = []
    for item, tokens in _tokenized(_items(job, encoder, chunk, rejected), encoder):
        encoded = _sample(job, item, tokens)
        if isinstance(encoded, str):
            rejected.append((item.file, item.line, encoded))
        else:
            samples.append(encoded)
    rejections = [
        # a reason may quote half of a surrogate pair, which no terminal can show
        Rejection(str(job.files[file]), line, reason.encode(errors="backslashreplace").decode())
        for file, line, reason in sorted(rejected)
    ]
    write_shard(shard_path(job.folder, chunk.number), samples, rejections, len(chunk.rows))
    return len(chunk.rows)


def _items(
    job: Preparation, encoder: ChatEncoder, chunk: Chunk, rejected: list[tuple[int, int, str]]
) -> Iterator[Item]:
    for file, row in chunk.rows:
        try:
            yield _item(job, encoder, file, row)
        except BadRow as error:  # noqa: PERF203
            rejected.append((file, row.line, str(error)))
        except MemoryError:
            raise  # no row is at fault
        # files hold what nobody has thought of, and templates are programs of others: that costs
        # the row, which is counted and named as any other bad one, not the rows of hours
        except Exception as error:  # noqa: BLE001
            rejected.append((file, row.line, f"unexpected {type(error).__name__}: {error}"))


def _item(job: Preparation, encoder: ChatEncoder, file: int, row: Row) -> Item:
    value = value_of(row)
    parsed = parse_row(value, job.dataset.prompt_key)
    content = parsed if isinstance(parsed, Tokens) else encoder.render(parsed)
    if isinstance(content, Rendered):  # tools and the arguments of calls are in it, too
        plain_text(content.text, "what the chat template makes of it")
    return Item(file, row.line, _id_hash(value), content)


def _tokenized(items: Iterator[Item], encoder: ChatEncoder) -> Iterator[tuple[Item, Tokens]]:
    """Rows with their tokens, in order."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH_ROWS:
            yield from _tokenize(batch, encoder)
            batch = []
    yield from _tokenize(batch, encoder)


def _tokenize(batch: list[Item], encoder: ChatEncoder) -> Iterator[tuple[Item, Tokens]]:
    texts = [item.content for item in batch if isinstance(item.content, Rendered)]
    tokens = iter(encoder.tokenize(texts))
    for item in batch:
        yield item, (item.content if isinstance(item.content, Tokens) else Tokens(*next(tokens)))


def _sample(job: Preparation, item: Item, tokens: Tokens) -> Encoded | str:
    """A sample, or why there is none."""
    ids, mask = tokens.input_ids[: job.max_seq_length], tokens.loss_mask[: job.max_seq_length]
    length, said = len(tokens.input_ids), int(mask[FIRST_SUPERVISED:].sum())
    if said < job.dataset.min_loss_tokens:
        if length > job.max_seq_length:
            return f"answer cut off: {said} supervised tokens in the first {job.max_seq_length}"
        return f"too few supervised tokens: {said}"
    if job.vocab_size is not None and (largest := int(ids.max(initial=0))) >= job.vocab_size:
        return f"token id outside the vocabulary: {largest} of {job.vocab_size}"
    rendered = item.content if isinstance(item.content, Rendered) else None
    columns: dict[str, Any] = {
        "length": len(ids),
        "full_length": length,
        "supervised": said,
        "changed": rendered.num_changed if rendered else 0,
        "is_text": bool(rendered and rendered.plain),
        "file": item.file,
        "line": item.line,
        "id_hash": item.id_hash,
    }
    return Encoded(ids, mask, columns)


def _id_hash(row: dict[str, Any]) -> int:
    """63 bits of the row's id; 0 if it has none."""
    if row.get("id") is None:
        return 0
    digest = blake2b(str(row["id"]).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


_worker: list[tuple[Preparation, ChatEncoder]] = []


def start_worker(job: Preparation, log_level: int) -> None:
    """Makes a process ready for :func:`work`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    logging.basicConfig(level=log_level)
    logging.getLogger("torchspec_hpc.data").setLevel(logging.ERROR)  # the main process says it
    _worker.append((job, job.encoder()))


def _end_with_parent() -> None:
    """Workers of a process that was killed would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(chunk: Chunk) -> int:
    """:func:`encode_chunk` in a process of its own."""
    return encode_chunk(*_worker[0], chunk)
