"""Which engines are there, by the files in ``control/ready``; and when too few are."""

from __future__ import annotations

import contextlib
import logging
import re

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError
from torchspec_hpc.slurm.failures import Failure, read_failures, refresh
from torchspec_hpc.slurm.steps import INFERENCE

logger = logging.getLogger(__name__)


class EnginesLost(TorchspecError):
    """There has been no engine for too long."""


class EngineWatch:
    """Tells of engines that come, fail and go; one of them is enough for the run to go on.

    An engine writes its file when it is ready, its shepherd removes it when the engine ends.
    Engines of jobs that have joined the run count as its own do.

    Args:
        run: The run.
        control: How long to wait.
        now: Monotonic seconds.
    """

    def __init__(self, run: RunDir, control: ControlConfig, now: float) -> None:
        self._run, self._control = run, control
        self._starts: dict[int, int] = {}  # rank -> when its file was written
        self._told: set[Failure] = set()
        self._any_ever = False
        self._last_seen = now

    @property
    def others_joined(self) -> bool:
        """Whether engines of other jobs serve this run, or will again."""
        return any(self._run.joined.glob("*.json"))

    def look(self, now: float, *, trains: bool) -> None:
        """Looks for changes.

        Args:
            now: Monotonic seconds.
            trains: The trainers have made a step since the last look, so there is an engine.

        Raises:
            DeadlineExceeded: None has become ready in time.
            EnginesLost: There was one, and has been none for ``control.engines_lost_s``.
        """
        self._tell_failures()
        found = self._read()
        self._tell_changes(found)
        self._starts = found
        if found or trains:
            self._any_ever, self._last_seen = True, now
        waited_s = now - self._last_seen
        if not self._any_ever and waited_s > self._control.engine_ready_s:
            raise DeadlineExceeded(
                "an engine to become ready (control.engine_ready_s)", self._control.engine_ready_s
            )
        if self._any_ever and waited_s > self._control.engines_lost_s:
            raise EnginesLost(
                f"there has been no engine for {waited_s:.0f} s (control.engines_lost_s)"
            )

    def _read(self) -> dict[int, int]:
        refresh(self._run.ready)
        found = {}
        for path in self._run.ready.glob(f"{INFERENCE}_*.json"):
            rank = re.fullmatch(rf"{INFERENCE}_(\d+)", path.stem)
            with contextlib.suppress(FileNotFoundError):  # ended meanwhile
                if rank:
                    found[int(rank[1])] = path.stat().st_mtime_ns
        return found

    def _tell_changes(self, found: dict[int, int]) -> None:
        for rank in sorted(self._starts.keys() - found.keys()):
            logger.warning("inference rank %d has ended; engines left: %d", rank, len(found))
        for rank, start in sorted(found.items()):
            if self._starts.get(rank) != start:
                logger.info("inference rank %d is ready", rank)
                # what it died of before is no cause of what comes
                (self._run.errors / f"{INFERENCE}_{rank}.json").unlink(missing_ok=True)

    def _tell_failures(self) -> None:
        for failure in read_failures(self._run):
            if failure.role == INFERENCE and failure not in self._told:
                logger.error("%s", failure)
                self._told.add(failure)
