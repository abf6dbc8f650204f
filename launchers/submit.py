#!/usr/bin/env python3
"""Submits one run from Python and waits for its end: ``launchers/submit.py CONFIG [KEY=VALUE]...``.

A starting point for launchers of your own.  What comes back is a submitit job (``state``,
``done``, ``wait``, ``result``, ``cancel``); a sweep is a loop over ``submit``, one job a run,
because Slurm has no arrays of heterogeneous jobs.  An interrupt leaves the job alone.
"""

from __future__ import annotations

import sys

from submitit.core.utils import FailedJobError

from torchspec_hpc.config import load_config
from torchspec_hpc.errors import (
    EXIT_CRASH,
    TorchspecError,
    exit_code_of,
)
from torchspec_hpc.slurm.submit import submit


def main(config: str, *overrides: str) -> int:
    """Returns 0 if the run is complete."""
    submitted = submit(load_config(config, overrides))
    start = submitted.earliest_start or "unknown"
    print(f"job {submitted.job_id}  earliest start {start}  {submitted.run.root}", flush=True)
    try:
        return submitted.job.result()
    except FailedJobError as error:
        print(error, file=sys.stderr)
        return EXIT_CRASH


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except TorchspecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
