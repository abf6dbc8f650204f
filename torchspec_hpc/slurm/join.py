"""Engines of another job: ``python -m torchspec_hpc.slurm.join --run-dir RUN [KEY=VALUE]...``.

The batch script of an inference-only job turns into this process.  It finds the run by its
directory, starts engines with ranks beyond the run's own, and leaves when the run is done or
when a job of the run does not come back.  Preemption costs the run nothing but speed: what these
engines had taken is asked for again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import EXIT_DONE, TorchspecError, exit_code_of
from torchspec_hpc.observe.logs import setup_logging
from torchspec_hpc.slurm.env import attempt, expand_nodelist, job_id, node_addresses
from torchspec_hpc.slurm.failures import FIRST_JOINED_RANK
from torchspec_hpc.slurm.job import Job
from torchspec_hpc.slurm.processes import Child, shepherded
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.shape import inference_group
from torchspec_hpc.slurm.signals import SignalInbox
from torchspec_hpc.slurm.srun import ENGINE_STEP, step_environment, step_resources
from torchspec_hpc.slurm.steps import (
    INFERENCE,
    Modules,
    Step,
    engine_shepherd_options,
    worker_environment,
)

logger = logging.getLogger(__name__)

ROLE = "joined"
_POLL_S = 1.0
#: From the request to leave until engines are killed; they hold nothing that would be lost.
_GRACE_S = 10.0


class JoiningJob:
    """The engines of this job.

    Args:
        run: The run.
        config: Its settings, with this job's own sizes.
        environ: Environment of the batch script.
        modules: What the step runs.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        environ: Mapping[str, str],
        modules: Modules = Modules(),  # noqa: B008 - frozen
    ) -> None:
        self._run, self._config, self._modules = run, config, modules
        self._runtime = Runtime(config, run)
        self._environ = step_environment(environ)
        self._job_id = job_id(environ)
        self._job = Job(self._job_id, attempt(environ), num_components=1)
        self._addresses = node_addresses(expand_nodelist(environ["SLURM_JOB_NODELIST"]))
        # of the run itself, whose own configuration the engines read
        self._own = load_config(run.config).inference
        self._inbox = SignalInbox()

    def serve(self) -> int:
        """Serves attempt after attempt and returns the exit code of this process."""
        with self._inbox:
            while (endpoints := self._next_attempt()) is not None:
                code = self._serve_attempt(endpoints)
                if code is not None:
                    return code
            return EXIT_DONE

    def _next_attempt(self) -> Endpoints | None:
        """Waits for an attempt that runs; None: there is none to wait for."""
        patience_s = self._config.control.service_ready_s
        deadline = time.monotonic() + patience_s
        while not self._run.done.exists():
            if self._run.endpoints.exists() and not self._run.exit_codes.exists():
                return Endpoints.read(self._run, patience_s)
            if self._inbox.take() or time.monotonic() > deadline:
                logger.info("leaving: no attempt of the run is there")
                return None
            time.sleep(_POLL_S)
        logger.info("leaving: the run is done")
        return None

    def _serve_attempt(self, endpoints: Endpoints) -> int | None:
        """Serves until the end of an attempt; returns an exit code where that ends this job."""
        setup_logging(f"{ROLE}_{self._job_id}", 0, self._run, endpoints.attempt)
        with self._registered() as number:
            logger.info("job %s joins attempt %d", self._job_id, endpoints.attempt)
            step = self._start(number, self._run.attempt_logs(endpoints.attempt))
            try:
                return self._watch(step, endpoints.attempt)
            finally:
                step.interrupt(_GRACE_S)

    def _watch(self, step: Step, attempt_number: int) -> int | None:
        while True:
            time.sleep(_POLL_S)
            if signals := self._inbox.take():
                return self._leave(signals[0])
            if self._run.done.exists() or not self._runs(attempt_number):
                logger.info("attempt %d of the run has ended", attempt_number)
                return None
            if (code := step.poll()) is not None:
                logger.error("all engines have ended; the log ends with:\n%s", step.log_tail())
                return code

    def _leave(self, number: signal.Signals) -> int:
        logger.info("leaving: %s", number.name)
        if number is signal.SIGUSR1 and self._config.slurm.resume == "requeue":
            self._job.requeue()  # the time limit; at preemption Slurm does it
        return EXIT_DONE

    def _runs(self, attempt_number: int) -> bool:
        try:
            found = json.loads(self._run.endpoints.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        return found["attempt"] == attempt_number and not self._run.exit_codes.exists()

    def _start(self, number: int, logs: Path) -> Step:
        group = inference_group(self._config)
        # ranks fill nodes and engines as those of the run do
        unit = self._own.ranks_per_node * self._own.nodes_per_engine
        first_rank = number * unit * -(-FIRST_JOINED_RANK // unit)
        python = self._runtime.worker_python
        engine = self._modules.engine_command(self._run, python)
        engine += ["--rank={rank}", f"--num-ranks={self._own.num_ranks}"]
        command = shepherded(
            self._runtime.enter(engine),
            *engine_shepherd_options(self._run, self._config.control, first_rank),
            python=self._runtime.shepherd_python,
        )
        options = [*step_resources(group), *ENGINE_STEP, *self._runtime.srun_options]
        argv = ["srun", *options, "--mem=0", "--unbuffered", "--label", "--export=ALL", *command]
        threads = self._config.inference.num_threads or group.options.cpus_per_task
        env = worker_environment(self._config, self._environ, threads)
        log = logs / f"{INFERENCE}_{ROLE}_{self._job_id}.log"
        return Step(INFERENCE, [Child(argv, log, env)], signal.SIGTERM)

    @contextlib.contextmanager
    def _registered(self) -> Iterator[int]:
        """Tells the run of this job: ``control/joined/<number>.json``, a number of its own."""
        claim = self._run.joined / f".{self._job_id}"
        write_atomic(claim, {"job_id": self._job_id, "addresses": self._addresses})
        for number in itertools.count(1):
            path = self._run.joined / f"{number}.json"
            with contextlib.suppress(FileExistsError):
                os.link(claim, path)  # over NFS too: one job succeeds
                break
        claim.unlink()
        try:
            yield number
        finally:
            path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the batch script."""
    parser = argparse.ArgumentParser(description="Engines that join a run.")
    parser.add_argument("--run-dir", required=True, type=Path, help="the run's directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="this job's own")
    arguments = parser.parse_args(argv)
    run = RunDir(arguments.run_dir)
    try:
        config = load_config(run.config, arguments.overrides)
        return JoiningJob(run, config, os.environ).serve()
    except TorchspecError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main())
