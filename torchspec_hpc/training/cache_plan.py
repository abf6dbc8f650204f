"""What a run will need of the cache of hidden states, before it trains: known, said and checked."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator

from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.training.answers import Samples
from torchspec_hpc.training.state_cache import StateCache, name_of

#: Greater and smaller than every name.
EVERYTHING, NOTHING = "~", ""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")

logger = logging.getLogger(__name__)


def plan_cache(
    cache: StateCache,
    what: str,
    num_bytes: dict[str, int],
    *,
    max_bytes: int | None,
    has_engines: bool,
) -> str:
    """Says what there is, what comes and what does not fit.

    Where not all may be kept it is those whose names come first.  Names are digests, so that is a
    share of each stretch of the data, and the same one in every run.

    Args:
        cache: Of hidden states.
        what: Names the samples in messages.
        num_bytes: Of the states of each sample, by name; see :func:`sizes_of`.
        max_bytes: Of those that are kept; None: all are.
        has_engines: What is not there can be had.

    Returns:
        The last name of those that are kept.

    Raises:
        ConfigError: Something is missing and there are no engines, or the disk has not the room.
    """
    present = cache.names()
    missing = num_bytes.keys() - present
    logger.info(
        "%s: hidden states of %d samples, %s; %d of them are in %s",
        what,
        len(num_bytes),
        readable(sum(num_bytes.values())),
        len(num_bytes) - len(missing),
        cache.folder,
    )
    if missing and not has_engines:
        raise ConfigError(
            f"{what}: the hidden states of {len(missing)} of {len(num_bytes)} samples are not in "
            f"{cache.folder}, and inference.inference_num_gpus = 0; {cache.nearest()}",
            hint="run once with engines and the same data, target and inference settings, without "
            "inference.cache_max_bytes",
        )
    keep_up_to = _bounded(what, num_bytes, max_bytes)
    _check_room(cache, what, sum(num_bytes[name] for name in missing if name <= keep_up_to))
    return keep_up_to


def sizes_of(cache: StateCache, dataset: Samples, indices: Iterable[int]) -> dict[str, int]:
    """Name and bytes of the states of samples; equal ones count once."""
    samples = (dataset[index].input_ids for index in indices)
    return {name_of(token_ids): len(token_ids) * cache.token_bytes for token_ids in samples}


def samples_between(sampler: Sampler, start: int, end: int, num_samples: int) -> list[int]:
    """Indices of the samples at the positions ``[start, end)`` of the stream, ascending.

    Args:
        sampler: The stream of packs.
        start: Where the run goes on.
        end: Where it ends.
        num_samples: Of the dataset: when all have come, nothing new follows.
    """
    seen: set[int] = set()
    for position in range(start, end):
        seen.update(map(int, sampler.samples_at(position)))
        if len(seen) == num_samples:
            break
    return sorted(seen)


def readable(num_bytes: float) -> str:
    """A size as people write it: ``1.5 GiB``."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} {_UNITS[-1]}"


def _bounded(what: str, num_bytes: dict[str, int], max_bytes: int | None) -> str:
    if max_bytes is None or sum(num_bytes.values()) <= max_bytes:
        return EVERYTHING
    kept, total = list(_first(num_bytes, max_bytes)), sum(num_bytes.values())
    logger.warning(
        "%s: inference.cache_max_bytes = %d holds %d of %d samples; the others, %.0f %% of the "
        "bytes, are asked for in every epoch",
        what,
        max_bytes,
        len(kept),
        len(num_bytes),
        100 * (1 - sum(num_bytes[name] for name in kept) / total),
    )
    return kept[-1] if kept else NOTHING


def _first(num_bytes: dict[str, int], max_bytes: int) -> Iterator[str]:
    """The first names that together have no more bytes than that."""
    for name in sorted(num_bytes):
        max_bytes -= num_bytes[name]
        if max_bytes < 0:
            return
        yield name


def _check_room(cache: StateCache, what: str, needed: int) -> None:
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise ConfigError(
            f"{what}: {readable(needed)} of hidden states are to be kept in {cache.folder}, and "
            f"the disk has {readable(free)} free",
            hint="set inference.cache_max_bytes, make room, or set inference.cache_dir to a larger "
            "disk or to null",
        )
