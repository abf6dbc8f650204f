"""Errors that a user can act on.

Everything a user can get wrong is raised as a :class:`UserError`: it ends the
process with exit code 2 and one message, without a traceback.  Faults of ours
stay ordinary exceptions and keep their traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
#: A checkpoint was written because a stop was asked for: requeue me.  No shell,
#: Slurm or Python convention uses 85 for anything else.
EXIT_REQUEUE = 85


class TorchspecError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(TorchspecError):
    """A mistake in what the user gave us.

    Args:
        what: What is wrong, with the value that was found.
        allowed: What would have been right, if it can be said.
        hint: What to do next.
    """

    def __init__(self, what: str, *, allowed: str | None = None, hint: str | None = None) -> None:
        self.what, self.allowed, self.hint = what, allowed, hint
        lines = [what]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if hint:
            lines.append(f"  next:    {hint}")
        super().__init__("\n".join(lines))


class ConfigError(UserError):
    """A configuration that cannot be used."""


class DataError(UserError):
    """Training or evaluation data that cannot be used."""


class DeadlineExceeded(TorchspecError):
    """A bounded wait ran out.

    Args:
        waited_for: What did not happen.
        seconds: How long we waited.
        hint: Where to look.
    """

    def __init__(self, waited_for: str, seconds: float, hint: str | None = None) -> None:
        self.waited_for, self.seconds = waited_for, seconds
        tail = f"\n  next:    {hint}" if hint else ""
        super().__init__(f"waited {seconds:.0f} s for {waited_for}, in vain{tail}")


def exit_code_of(error: BaseException) -> int:
    """Exit code of a process that this error ends: the user's mistakes have one of their own."""
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_CRASH
