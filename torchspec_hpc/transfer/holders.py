"""Which engine has taken which request, and which of those engines are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import MessageError, Taken

logger = logging.getLogger(__name__)

#: An engine that has sent no heartbeat for so many of its intervals is gone.
STALE_BEATS = 4


@dataclass
class _Engine:
    """An inference rank as last seen: its heartbeat, and by our clock since when."""

    session: str
    beat: float
    seen: float


class Holders:
    """Tells, long before the deadline of a request, that nobody works on it any more.

    An engine is gone when another one sends heartbeats as its rank, or when nobody does; the
    age of a heartbeat is measured by this node's clock.  So is an engine that has taken a
    request and does not even say so.

    Args:
        control: Connection to the control store.
        rank: Of the trainer that asks.
        heartbeat_s: Seconds between heartbeats of an engine.
    """

    def __init__(self, control: ControlClient, rank: int, heartbeat_s: float) -> None:
        self._control, self._rank, self._interval_s = control, rank, heartbeat_s
        self._stale_s = STALE_BEATS * heartbeat_s
        self._taken: dict[str, Taken] = {}  # by key
        self._silent: dict[str, float] = {}  # key -> since when nobody says that it has it
        self._engines: dict[int, _Engine] = {}
        self._due = 0.0

    def lost(self, waiting: Mapping[str, int]) -> dict[str, str]:
        """Requests whose engine is gone; looks once in an interval of heartbeats.

        Args:
            waiting: Key -> place in the queue, of all requests that wait for an answer.

        Returns:
            Key -> what became of it.
        """
        now = time.monotonic()
        if now < self._due or not waiting:
            return {}
        self._due = now + self._interval_s
        found = {**self._taken, **{taken.key: taken for taken in self._news()}}
        self._taken = {key: found[key] for key in waiting if key in found}
        return self._gone(now) | self._never_heard_of(waiting, now)

    def _news(self) -> list[Taken]:
        try:
            return self._control.pop_taken(self._rank)
        except MessageError as error:  # whoever pushed it is no engine of ours
            logger.error("dropped what an engine says: %s", error)
            return []

    def _gone(self, now: float) -> dict[str, str]:
        ranks = {taken.engine for taken in self._taken.values()}
        for beat in self._control.last_beats("inference", sorted(ranks)):
            known = self._engines.get(beat.rank)
            if known is None or (known.session, known.beat) != (beat.session, beat.time):
                self._engines[beat.rank] = _Engine(beat.session, beat.time, now)
        return {
            key: f"engine {taken.engine} took it and is gone"
            for key, taken in self._taken.items()
            if self._engines[taken.engine].session != taken.session
            or now - self._engines[taken.engine].seen > self._stale_s
        }

    def _never_heard_of(self, waiting: Mapping[str, int], now: float) -> dict[str, str]:
        unheard = [key for key in waiting if key not in self._taken]
        num_taken = self._control.requests_taken() if unheard else 0
        self._silent = {
            key: self._silent.get(key, now) for key in unheard if waiting[key] <= num_taken
        }
        return {
            key: "an engine took it and died"
            for key, since in self._silent.items()
            if now - since > self._stale_s
        }
