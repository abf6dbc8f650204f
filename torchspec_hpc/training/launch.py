"""torchrun that ends with its trainers' exit code.

``python -m torchspec_hpc.training.launch`` takes torchrun's arguments.  torchrun itself ends
with 1 whatever its processes ended with, and the supervisor must tell "checkpointed, requeue
me" from a crash.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from torchspec_hpc.errors import EXIT_CRASH, EXIT_REQUEUE, EXIT_USER_ERROR


def main(arguments: list[str]) -> int:
    """Runs torchrun and returns the exit code of the trainers of this node."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a warning to the job; trainers inherit this
    try:
        torchrun.main(arguments)
    except ChildFailedError as error:
        return node_exit_code(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        return 128 + error.sigval
    return 0


def node_exit_code(exit_codes: Iterable[int]) -> int:
    """The exit code that tells what happened, of those of the trainers that failed.

    The first to end takes the others with it, so most of them tell nothing.

    Args:
        exit_codes: Not 0; negative where a signal ended the process.
    """
    codes = list(exit_codes)
    # a trainer says 85 only after the checkpoint of all ranks counts
    for telling in (EXIT_REQUEUE, EXIT_USER_ERROR):
        if telling in codes:
            return telling
    positive = [code for code in codes if code > 0]
    if positive:
        return positive[0]
    return 128 - codes[0] if codes else EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
