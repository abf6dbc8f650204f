"""``torchspec-hpc``: every command, thin shells around the packages below.

Commands import what they need when they run, so that ``--help`` answers at once
and the login node never loads torch.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from torchspec_hpc import __version__
from torchspec_hpc.cli import run_commands, submit_commands
from torchspec_hpc.cli.arguments import ConfigFile, Overrides, Resume, RunPath
from torchspec_hpc.cli.export_command import export
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
    from torchspec_hpc.slurm.prepare import prepare_run

    settings = load_config(config, [*(overrides or ()), "cluster=local"])
    prepared = prepare_run(settings, resume=resume)
    print(f"run directory: {prepared.root}", flush=True)
    with watch_metrics(prepared):
        code = run_local(prepared)
    raise typer.Exit(code)


app.add_typer(submit_commands.app)
app.add_typer(run_commands.app)
app.command()(export)


@app.command()
def evaluate(
    target: Annotated[str, typer.Option(help="Target model directory or hub id.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with messages or prompt in each row.")],
    draft: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="Exported draft; repeatable.")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Also serve the target alone.")] = True,
    num_speculative_tokens: Annotated[int, typer.Option("-k", min=1)] = 3,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    concurrency: Annotated[int, typer.Option(min=1)] = 8,
    tp_size: Annotated[int, typer.Option(min=1, help="GPUs of the engine.")] = 1,
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens, prompt and answer.")] = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Serve drafts in vLLM and measure acceptance length and tokens/s."""
    from torchspec_hpc.cli.evaluate_command import evaluate_command
    from torchspec_hpc.export.evaluate import ServeSettings

    settings = ServeSettings(
        target=target,
        num_speculative_tokens=num_speculative_tokens,
        max_tokens=max_tokens,
        concurrency=concurrency,
        max_model_len=max_model_len,
        tensor_parallel_size=tp_size,
    )
    evaluate_command(settings, prompts, draft or [], baseline=baseline, limit=limit, output=output)


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
