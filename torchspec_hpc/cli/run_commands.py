"""Commands about runs that exist: status, logs, cancel, resume, tb.

Exit codes: 0 done, 1 Slurm does not answer, 2 a mistake of the user, 3 a run has failed.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec_hpc.cli.arguments import Json, Overrides, RunPath, RunPaths
from torchspec_hpc.cli.output import print_json, print_table

if TYPE_CHECKING:
    from torchspec_hpc.config import RunDir

logger = logging.getLogger(__name__)
app = typer.Typer()

EXIT_RUN_FAILED = 3
#: Between questions to the scheduler while logs are followed; each wait is longer than the last.
_FIRST_ASK_S, _LONGEST_ASK_S, _GROWTH = 30.0, 300.0, 1.5


@app.command()
def status(
    runs: RunPaths,
    json: Json = False,
    queue: Annotated[
        bool, typer.Option("--queue", help="Look at all jobs, to tell the place among them.")
    ] = False,
) -> None:
    """Say how runs are doing; 3 if one has failed."""
    from torchspec_hpc.slurm.status import NEEDS_ATTENTION, find_runs, read_status

    found = read_status(find_runs(runs), whole_queue=queue)
    if json:
        print_json([one.as_json() for one in found])
    else:
        steps = [f"{s.step}/{s.num_steps}" if s.num_steps else s.step for s in found]
        columns: dict[str, list[object]] = {
            "run": [Path(s.run).name for s in found],
            "state": [s.state for s in found],
            "job": [s.job_id for s in found],
            "step": list(steps),
            "loss": [s.loss for s in found],
            "accept len": [s.best_accept_len or s.accept_len for s in found],
            "trainer tok/s": [s.train_tokens_per_s for s in found],
            "engine tok/s": [s.inference_tokens_per_s for s in found],
            "time left": [s.time_left for s in found],
        }
        if queue:
            columns["place"] = [s.position for s in found]
        print_table(columns)
        for one in found:
            if one.reason:
                start = f", expected to start {one.start}" if one.state == "queued" else ""
                print(f"{Path(one.run).name}: {one.reason}{start if one.start else ''}")
    if any(one.state in NEEDS_ATTENTION for one in found):
        raise typer.Exit(EXIT_RUN_FAILED)


@app.command()
def logs(
    run_dir: RunPath,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="supervisor (default), training, inference, mooncake, control, training_step, "
            "inference_step, batch; repeatable."
        ),
    ] = None,
    node: Annotated[str | None, typer.Option(help="Host name; default: all.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Global rank; default: all.")] = None,
    attempt: Annotated[int | None, typer.Option(min=0, help="Default: the newest.")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Of each file.")] = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the run ends.")] = False,
    json: Annotated[bool, typer.Option("--json", help="List the files as JSON.")] = False,
) -> None:
    """Print the logs of a run, by role, node and rank."""
    from torchspec_hpc.config import RunDir
    from torchspec_hpc.errors import UserError
    from torchspec_hpc.slurm import logfiles

    if unknown := set(role or ()) - set(logfiles.ROLES):
        raise UserError(f"--role {' '.join(unknown)}", allowed=", ".join(logfiles.ROLES))
    run = RunDir(run_dir)
    query = logfiles.LogQuery(tuple(role or ["supervisor"]), node, rank, attempt)
    files = logfiles.find_logs(run, query)
    if json:
        print_json([str(path) for path in files])
        return
    positions = {}
    for path in files:
        text, positions[path] = logfiles.last_lines(path, lines)
        _print_log(run, path, text, named=len(files) > 1)
    if follow:
        parts = logfiles.follow(
            lambda: logfiles.find_logs(run, query), positions, _EndWatch(run).has_ended
        )
        for path, text in parts:
            _print_log(run, path, text, named=len(positions) > 1)


@app.command()
def cancel(
    run_dir: RunPath,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait, and end it by force if it takes long.")] = True,
    json: Json = False,
) -> None:
    """End a run for good: with a checkpoint, then by force."""
    from torchspec_hpc.config import RunDir
    from torchspec_hpc.slurm.cancel import cancel as cancel_run

    def tell(text: str) -> None:
        if not json:
            print(text, flush=True)

    run = RunDir(run_dir)
    outcome = cancel_run(run, now=now, wait=wait, tell=tell)
    if json:
        print_json({"run": str(run.root), "outcome": outcome})
    else:
        print(outcome)


@app.command()
def resume(run_dir: RunPath, overrides: Overrides = None, json: Json = False) -> None:
    """Submit a run again, from its latest checkpoint."""
    from torchspec_hpc.config import RunDir, load_config
    from torchspec_hpc.errors import UserError
    from torchspec_hpc.slurm.prepare import run_directory
    from torchspec_hpc.slurm.record import require_run
    from torchspec_hpc.slurm.submit import submit

    run = RunDir(run_dir)
    require_run(run)
    config = load_config(run.config, overrides or ())
    configured = run_directory(config).root
    if not (configured.exists() and configured.samefile(run.root)):
        raise UserError(
            f"{run.config} belongs to {configured}",
            hint="was the run moved? set output_dir and run_name to where it is now",
        )
    if config.cluster == "local":
        raise UserError(
            "this is a local run", hint=f"torchspec-hpc run {run.config} --resume; or cluster=slurm"
        )
    submitted = submit(config, resume=True)
    if json:
        print_json(submitted.as_json())
    else:
        print(f"job {submitted.job_id}  run directory: {submitted.run.root}")


@app.command()
def tb(
    runs: RunPaths,
    port: Annotated[int, typer.Option(min=0, help="0: any free one.")] = 0,
    memory_gib: Annotated[float, typer.Option(min=0.5, help="It may take, GiB.")] = 4.0,
    on_compute: Annotated[
        bool, typer.Option("--on-compute", help="In a small job of its own.")
    ] = False,
    time_limit: Annotated[str, typer.Option(help="Of that job.")] = "08:00:00",
    jump: Annotated[str | None, typer.Option(help="Login node before this one.")] = None,
    json: Json = False,
) -> None:
    """Serve TensorBoard on the loopback interface, and print the ssh command to reach it."""
    from torchspec_hpc.slurm.status import find_runs
    from torchspec_hpc.slurm.tensorboard import Tensorboard, limit_memory, submit_tensorboard

    found = find_runs(runs)
    if on_compute:
        job_id, log = submit_tensorboard(found, time_limit)
        if json:
            print_json({"job_id": job_id, "log": str(log)})
        else:
            print(f"job {job_id}  once it runs, the ssh command stands in {log}")
        return
    board = Tensorboard.on_port(found, port)
    if json:
        print_json({"url": board.url, "tunnel": board.tunnel(jump), "host": socket.getfqdn()})
    else:
        print(
            f"on your computer:  {board.tunnel(jump)}\nthen open:         {board.url}", flush=True
        )
    limit_memory(int(memory_gib * 2**30))
    os.execv(board.command[0], board.command)  # noqa: S606 - what we print is what runs


def _print_log(run: RunDir, path: Path, text: str, *, named: bool) -> None:
    if named and text:
        print(f"==> {os.path.relpath(path.resolve(), run.root.resolve())} <==")
    print(text, end="", flush=True)


class _EndWatch:
    """Knows whether a run has ended: from its files, now and then from the scheduler."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._wait_s = run, _FIRST_ASK_S
        self._asked = time.monotonic()

    def has_ended(self) -> bool:
        from torchspec_hpc.slurm.scheduler import SchedulerError
        from torchspec_hpc.slurm.status import read_status

        if self._run.done.exists() and not self._run.lock.exists():
            return True
        if time.monotonic() - self._asked < self._wait_s:
            return False
        self._asked = time.monotonic()
        self._wait_s = min(self._wait_s * _GROWTH, _LONGEST_ASK_S)
        try:
            (status,) = read_status([self._run])
        except SchedulerError as error:  # it is asked again
            logger.warning("%s", error)
            return False
        return status.state not in ("running", "starting", "queued")
