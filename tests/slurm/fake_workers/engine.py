"""Stands in for ``torchspec_hpc.inference.worker``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time

from tests.slurm.fake_workers.plan import Plan
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError
from torchspec_hpc.observe.logs import report_error, setup_logging

logger = logging.getLogger("torchspec_hpc.fake")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", 0)))
    parser.add_argument("--num-ranks", type=int)
    arguments = parser.parse_args()
    run, rank = RunDir(arguments.run_dir), arguments.rank
    plan = Plan.read(run)
    endpoints = Endpoints.read(run, 20)
    setup_logging("inference", rank, run, endpoints.attempt)
    logger.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if plan.leave_orphan:
        orphan = [sys.executable, "-c", "import time; time.sleep(600)", str(run.root)]
        subprocess.Popen(orphan, start_new_session=True)
    if plan.engine == "user error" or (plan.engine == "one user error" and rank == 0):
        return report_error(run, "inference", rank, UserError("there is no model in /nowhere"))
    if plan.engine == "die":
        print("the engine has a fit", file=sys.stderr)
        return 3
    if plan.engine != "never ready":
        write_atomic(run.ready / f"inference_{rank}.json", {"ready": True})
    if plan.engine == "die later" or (plan.engine == "die twice" and count_start(run) < 3):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.sigwait({signal.SIGINT})
    return 0


def count_start(run: RunDir) -> int:
    with (run.root / "starts").open("a+") as file:
        file.write("start\n")
        file.flush()
        file.seek(0)
        return len(file.readlines())


if __name__ == "__main__":
    # to be found waiting, or not at all
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.exit(main())
