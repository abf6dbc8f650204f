"""Whether a run goes on after an attempt: the whole policy, without side effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchspec_hpc.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR
from torchspec_hpc.slurm.attempts import Attempt

#: Attempts in a row that were asked to stop before they made a checkpoint.  One or two happen
#: (preempted while the engine loads); more say that the time limit is too short to begin with.
MAX_STOPS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Rules:
    """What limits requeues.

    Attributes:
        can_requeue: The run is a Slurm job and ``slurm.requeue`` allows it.
        max_attempts: Of the whole run, crashes included.
    """

    can_requeue: bool
    max_attempts: int


@dataclass(frozen=True)
class Verdict:
    """What happens next.

    Attributes:
        requeue: Put the job back into the queue.
        reason: Why, or why not; empty for a finished run.
    """

    requeue: bool
    reason: str


def decide(exit_code: int, history: Sequence[Attempt], rules: Rules) -> Verdict:
    """Decides on the last attempt.

    A run that was asked to stop (85) goes on.  A crash is tried again only if this attempt
    left a newer checkpoint than it found: otherwise the next one would crash at the same
    step.  A user error never heals by itself.

    Args:
        exit_code: Of the last attempt.
        history: All attempts, the last one with its end filled in.
        rules: What limits requeues.
    """
    if exit_code == EXIT_DONE:
        return Verdict(False, "")
    if exit_code == EXIT_USER_ERROR:
        return Verdict(False, "an error that only its user can mend is not tried again")
    if not rules.can_requeue:
        return Verdict(False, "this run does not requeue itself")
    if len(history) >= rules.max_attempts:
        return Verdict(False, f"{len(history)} attempts were made (slurm.max_attempts)")
    if exit_code == EXIT_REQUEUE:
        recent = history[-MAX_STOPS_WITHOUT_PROGRESS:]
        if len(recent) == MAX_STOPS_WITHOUT_PROGRESS and not any(a.made_progress for a in recent):
            return Verdict(False, f"{len(recent)} attempts in a row made no checkpoint")
        return Verdict(True, "stopped as asked")
    if not history[-1].made_progress:
        return Verdict(False, f"no progress since step {history[-1].first_step}")
    return Verdict(True, f"crashed, but got from step {history[-1].first_step} on")
