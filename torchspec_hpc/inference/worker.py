"""One inference rank: ``python -m torchspec_hpc.inference.worker --run-dir RUN``.

Everything it needs is in the run directory.  It keeps no state: it may be killed
and started again at any time, and requests it had taken are asked for again by
their requesters.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType

from torchspec_hpc.config import Config, RunDir, load_config
from torchspec_hpc.config.endpoints import Endpoints, read_secret
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.errors import EXIT_DONE
from torchspec_hpc.inference.engines.base import EngineContext
from torchspec_hpc.inference.engines.registry import create_engine
from torchspec_hpc.inference.placement import place, visible_devices
from torchspec_hpc.inference.serving import Heartbeat, Progress, Server
from torchspec_hpc.observe.logs import report_error, setup_logging
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.transfer.control import ControlClient

ROLE = "inference"

logger = logging.getLogger(__name__)
_stop = threading.Event()


class Dismissed(BaseException):
    """We were asked to leave. No ``Exception``: nothing on the way may take it for a failure."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one rank until SIGINT or SIGTERM; the supervisor sends the former.

    Returns:
        The exit code.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the supervisor
    signal.signal(signal.SIGINT, _dismiss)
    signal.signal(signal.SIGTERM, _dismiss)
    arguments = _parse(argv, os.environ)
    run = RunDir(arguments.run_dir)
    try:
        config = load_config(run.config)
        endpoints = Endpoints.read(run, config.control.service_ready_s)
        setup_logging(ROLE, arguments.rank, run, endpoints.attempt)
        placement = place(config.inference, arguments.rank, arguments.num_ranks)
        _take_devices(config, placement.devices)
        spec = TargetSpec.from_path(config.model.target_model_path)
        context = EngineContext(config, run, endpoints, spec, arguments.rank, placement)
        if placement.node == 0:
            _serve(context)
        else:
            from torchspec_hpc.inference.engines.vllm_follower import follow

            follow(context)
    except Dismissed as signal_name:
        logger.info("%s: leaving", signal_name)
    except Exception as error:  # noqa: BLE001 - the process's last line of defence
        return report_error(run, ROLE, arguments.rank, error)
    return EXIT_DONE


def _serve(context: EngineContext) -> None:
    config, run, endpoints, rank = context.config, context.run, context.endpoints, context.rank
    with contextlib.ExitStack() as cleanup:
        control = ControlClient(
            endpoints.control, read_secret(run), timeout_s=config.control.service_ready_s
        )
        cleanup.callback(control.close)
        progress = Progress()
        heartbeat = Heartbeat(control, rank, progress, config.control.heartbeat_s)
        heartbeat.start()
        cleanup.callback(heartbeat.stop)
        engine = create_engine(context)
        cleanup.callback(engine.close)
        progress.ready = True
        heartbeat.beat()
        write_atomic(run.ready / f"{ROLE}_{rank}.json", {"ready": True})  # for the supervisor
        logger.info("engine %s is ready", config.inference.engine)
        Server(engine, control, progress).serve(_stop)


def _take_devices(config: Config, devices: tuple[int, ...]) -> None:
    """Narrows this process down to its GPUs, before anything initializes CUDA."""
    if config.inference.device == "cpu":
        return
    import torch

    if config.inference.device == "cuda" or torch.cuda.device_count() > 0:
        current = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(devices, current)


def _parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One inference rank of a run.")
    parser.add_argument("--run-dir", required=True, help="the run's directory")
    parser.add_argument(
        "--rank",
        type=int,
        default=int(environ.get("SLURM_PROCID", 0)),
        help="of this process in the group (default: SLURM_PROCID, else 0)",
    )
    parser.add_argument(
        "--num-ranks",
        type=int,
        default=int(environ.get("SLURM_NTASKS", 1)),
        help="processes of the group (default: SLURM_NTASKS, else 1)",
    )
    return parser.parse_args(argv)


def _dismiss(number: int, _frame: FrameType | None) -> None:
    if not _stop.is_set():
        _stop.set()  # also seen by the loop, should the exception be swallowed by a callback
        raise Dismissed(signal.Signals(number).name)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    # everything is closed by now; an ordinary exit spends ten more seconds in destructors
    os._exit(code)
