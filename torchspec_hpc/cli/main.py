"""``torchspec-hpc``: every command, thin shells around the packages below.

Commands import what they need when they run, so that ``--help`` answers at once
and the login node never loads torch.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from torchspec_hpc import __version__
from torchspec_hpc.cli import data_commands, run_commands, submit_commands
from torchspec_hpc.cli.arguments import ConfigFile, Overrides, Resume, RunPath
from torchspec_hpc.cli.evaluate_command import evaluate
from torchspec_hpc.cli.export_command import export
from torchspec_hpc.cli.follow_command import follow
from torchspec_hpc.errors import TorchspecError, exit_code_of

app = typer.Typer(
    name="torchspec-hpc",
    help="Train speculative-decoding draft models on Slurm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train speculative-decoding draft models on Slurm."""
    if version:
        print(__version__)
        raise typer.Exit
    from torchspec_hpc.observe.logs import log_level

    logging.basicConfig(level=log_level(), format="%(levelname).1s %(name)s: %(message)s")


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Run here, in the foreground, without Slurm."""
    from torchspec_hpc.cli.progress import watch_metrics
    from torchspec_hpc.config import load_config
    from torchspec_hpc.slurm.local import run_local
    from torchspec_hpc.slurm.prepare import check_not_queued, prepare_run, run_directory
    from torchspec_hpc.slurm.record import RunRecord

    settings = load_config(config, [*(overrides or ()), "cluster=local"])
    record = RunRecord.read(run_directory(settings))
    if resume and record is not None and record.cluster == "slurm":
        check_not_queued(run_directory(settings))
    prepared = prepare_run(settings, resume=resume)
    print(f"run directory: {prepared.root}", flush=True)
    with watch_metrics(prepared):
        code = run_local(prepared)
    raise typer.Exit(code)


app.add_typer(submit_commands.app)
app.add_typer(run_commands.app)
app.command()(export)
app.command()(evaluate)
app.command()(follow)
app.add_typer(data_commands.app)


@app.command()
def report(run_dir: RunPath) -> None:
    """Print a run's figures: losses, acceptance, throughput, and the served measure if taken."""
    from torchspec_hpc.cli.report_command import report_command
    from torchspec_hpc.config import RunDir

    report_command(RunDir(run_dir))


def main() -> None:
    """Entry point: user errors end with one message and exit code 2, without a traceback."""
    try:
        app()
    except TorchspecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()
