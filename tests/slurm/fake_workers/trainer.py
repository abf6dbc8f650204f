"""Stands in for ``torchspec_hpc.training.worker``: counts steps, one rank after another."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time

from tests.slurm.fake_workers.plan import Plan
from torchspec_hpc.config.checkpoint_files import latest_step
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import EXIT_DONE, EXIT_REQUEUE, TorchspecError, UserError
from torchspec_hpc.observe.logs import report_error, setup_logging

logger = logging.getLogger("torchspec_hpc.fake")


class Trainer:
    def __init__(self, run: RunDir, plan: Plan) -> None:
        self.run, self.plan, self.step = run, plan, latest_step(run)

    def train(self) -> int:
        while self.step < self.plan.num_steps:
            time.sleep(self.plan.step_s)
            self.step += 1
            with self.run.metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, "train/loss": 1 / self.step}) + "\n")
            if self.step == self.plan.crash_at:
                raise_for(self.plan.crash_code)
            if self.run.stop.exists() and not self.plan.deaf:
                self.save()
                return EXIT_REQUEUE
            if self.plan.save_every and self.step % self.plan.save_every == 0:
                self.save()
        self.save()
        write_atomic(self.run.done, {"step": self.step})
        return EXIT_DONE

    def save(self) -> None:
        (self.run.checkpoints / f"step_{self.step}").mkdir(parents=True, exist_ok=True)
        write_atomic(self.run.latest_checkpoint, f"step_{self.step}\n")


def raise_for(code: int) -> None:
    if code == 2:
        raise UserError("the data is no good")
    if code == 1:
        raise TorchspecError("the loss is not finite")
    os._exit(code)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir")
    run = RunDir(parser.parse_args(argv).run_dir)
    rank = int(os.environ.get("RANK", os.environ.get("PET_NODE_RANK", 0)))
    attempt = Endpoints.read(run, 20).attempt
    setup_logging("training", rank, run, attempt)
    logger.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES"))
    told = run.root / f"told_{attempt}"  # rank 0's exit code, for the other ranks
    if rank:
        while not told.exists():
            time.sleep(0.02)
        return int(told.read_text())
    try:
        code = Trainer(run, Plan.read(run)).train()
    except TorchspecError as error:
        code = report_error(run, "training", rank, error)
    write_atomic(told, str(code))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
