"""Which engine has taken which request, and which of those engines are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import MessageError, Taken

logger = logging.getLogger(__name__)

#: An engine that has sent no heartbeat for so many of its intervals is gone.
_STALE_BEATS = 4


@dataclass
class _Engine:
    """An inference rank as last seen: the session of its heartbeat, and since when."""

    session: str
    beat: float
    seen: float


class Holders:
    """Tells, long before the deadline of a request, that nobody works on it any more.

    An engine is gone when another one sends heartbeats as its rank, or when nobody does; the
    age of a heartbeat is measured by this node's clock.  A request that was taken by an engine
    which died before it could say so is left to its deadline.

    Args:
        control: Connection to the control store.
        rank: Of the trainer that asks.
        heartbeat_s: Seconds between heartbeats of an engine.
    """

    def __init__(self, control: ControlClient, rank: int, heartbeat_s: float) -> None:
        self._control, self._rank, self._interval_s = control, rank, heartbeat_s
        self._taken: dict[str, Taken] = {}  # by key
        self._engines: dict[int, _Engine] = {}
        self._due = 0.0

    def lost(self, keys: Collection[str]) -> dict[str, int]:
        """Requests whose engine is gone; looks once in an interval of heartbeats.

        Args:
            keys: Of all requests that wait for an answer.

        Returns:
            Key -> rank of the engine that had taken it.
        """
        now = time.monotonic()
        if now < self._due:
            return {}
        self._due = now + self._interval_s
        found = {**self._taken, **{taken.key: taken for taken in self._news()}}
        self._taken = {key: found[key] for key in keys if key in found}
        self._look(now)
        return {
            key: taken.engine for key, taken in self._taken.items() if self._is_gone(taken, now)
        }

    def _news(self) -> list[Taken]:
        try:
            return self._control.pop_taken(self._rank)
        except MessageError as error:  # whoever pushed it is no engine of ours
            logger.error("dropped what an engine says: %s", error)
            return []

    def _look(self, now: float) -> None:
        ranks = {taken.engine for taken in self._taken.values()}
        for beat in self._control.last_beats("inference", sorted(ranks)):
            known = self._engines.get(beat.rank)
            if known is None or (known.session, known.beat) != (beat.session, beat.time):
                self._engines[beat.rank] = _Engine(beat.session, beat.time, now)

    def _is_gone(self, taken: Taken, now: float) -> bool:
        engine = self._engines.get(taken.engine)
        if engine is None:
            return False  # not seen yet: the deadline counts
        return engine.session != taken.session or (
            now - engine.seen > _STALE_BEATS * self._interval_s
        )
