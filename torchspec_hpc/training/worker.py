"""One trainer rank: ``torchrun ... -m torchspec_hpc.training.worker --run-dir RUN``.

Exit codes: 0 done, 85 checkpointed because a stop was asked for, 2 a mistake in
what the user gave us, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import EXIT_CRASH
from torchspec_hpc.observe.logs import report_error, setup_logging
from torchspec_hpc.training.parallel import join, rank_from_environment
from torchspec_hpc.training.setup import build_trainer

ROLE = "training"

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank to the end of the run or to a stop.

    Returns:
        The exit code.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the supervisor
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # leave at once: a checkpoint is whole or not
    parser = argparse.ArgumentParser(description="One trainer rank of a run.")
    parser.add_argument("--run-dir", required=True, help="the run's directory")
    run = RunDir(parser.parse_args(arguments).run_dir)
    rank, connections = 0, ExitStack()
    reported_before = _reports(run)
    try:
        rank = rank_from_environment()
        config = load_config(run.config)
        endpoints = Endpoints.read(run, config.control.service_ready_s)
        setup_logging(ROLE, rank, run, endpoints.attempt)
        world = join(config.training)
        exit_code = build_trainer(config, run, endpoints, world, connections).run()
        connections.close()  # after an error nothing is closed: it may wait for what is broken
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - the process's last line of defence
        exit_code = _fail(run, rank, error, reported_before)
    return exit_code


def _fail(run: RunDir, rank: int, error: Exception, reported_before: set[Path]) -> int:
    """Reports an error, unless it is only the echo of another rank's.

    A rank reports before it leaves, and only then do its peers' collectives fail.
    """
    peers = sorted(path.stem for path in _reports(run) - reported_before)
    if not peers:
        return report_error(run, ROLE, rank, error)
    logger.error("leaving because of %s: %s", ", ".join(peers), error)
    return EXIT_CRASH


def _reports(run: RunDir) -> set[Path]:
    return set(run.errors.glob(f"{ROLE}_*.json"))


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    # not sys.exit: threads of the store and of a broken process group must not keep us
    os._exit(code)
