"""How an attempt ended, and whether the run goes on: the whole policy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from torchspec_hpc.slurm.attempts import Attempt

logger = logging.getLogger(__name__)

#: Attempts in a row without a new checkpoint.  One or two happen: preempted while the engine
#: loads, or a step that Slurm could not launch on a node that had just come back.
MAX_IDLE_ATTEMPTS = 3


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        exit_code: 0 done, 85 stopped with a checkpoint, 2 the user's mistake, else a crash.
        message: One clear message.
        launched: False where a step ended before any of its workers lived to write a log.
    """

    exit_code: int
    message: str
    launched: bool = True


@dataclass(frozen=True)
class Rules:
    """What limits requeues.

    Attributes:
        can_requeue: The run is a Slurm job and ``slurm.resume`` is not ``none``.
        max_requeues: Of the whole run, those after crashes included.
    """

    can_requeue: bool
    max_requeues: int


@dataclass(frozen=True)
class Verdict:
    """What happens next.

    Attributes:
        requeue: Put the job back into the queue.
        reason: Why, or why not; empty for a finished run.
    """

    requeue: bool
    reason: str


def decide(ending: Ending, history: Sequence[Attempt], rules: Rules) -> Verdict:
    """Decides on the last attempt.

    A run that was asked to stop goes on, and so does one that could not be launched.  A crash is
    tried again only if this attempt left a newer checkpoint than it found: otherwise the next
    one would crash at the same step.  A user error never heals by itself.

    Args:
        ending: Of the last attempt.
        history: All attempts, the last one with its end filled in.
        rules: What limits requeues.
    """
    if ending.exit_code == EXIT_DONE:
        return Verdict(False, "")
    if ending.exit_code == EXIT_USER_ERROR:
        return Verdict(False, "an error that only its user can mend is not tried again")
    if not rules.can_requeue:
        return Verdict(False, "this run does not requeue itself")
    if len(history) > rules.max_requeues:
        return Verdict(False, f"{len(history) - 1} requeues were made (slurm.max_requeues)")
    last, recent = history[-1], history[-MAX_IDLE_ATTEMPTS:]
    if last.made_progress:
        return Verdict(True, f"from step {last.last_step} on")
    if ending.exit_code != EXIT_REQUEUE and ending.launched:
        return Verdict(False, f"it crashed without progress since step {last.first_step}")
    if len(recent) == MAX_IDLE_ATTEMPTS and not any(a.made_progress for a in recent):
        return Verdict(False, f"{MAX_IDLE_ATTEMPTS} attempts in a row made no checkpoint")
    return Verdict(True, f"from step {last.first_step} on, without progress so far")


def record_ending(run: RunDir, ending: Ending, details: Mapping[str, Any]) -> None:
    """Writes ``control/exit_codes.json``; a full disk must not hide how it ended."""
    known = {"exit_code": ending.exit_code, "message": ending.message}
    try:
        write_atomic(run.exit_codes, {**known, **details})
    except OSError as error:
        logger.error("cannot write %s: %s", run.exit_codes, error)
