"""``torchspec-hpc follow``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def follow(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|SAMPLE", help="As for evaluate; default: chat and code."),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements, at least.")] = 1,
    num_speculative_tokens: Annotated[int, typer.Option("-k", min=1)] = 3,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations in flight.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens, prompt and answer.")] = 2048,
    tp_size: Annotated[int, typer.Option(min=1, help="GPUs of the engine.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts of each file.")] = None,
) -> None:
    """Serve each new checkpoint of a run and add its acceptance to the run's TensorBoard."""
    from torchspec_hpc.config import RunDir, load_config
    from torchspec_hpc.export.evaluate import Case, ServeSettings
    from torchspec_hpc.export.follow import FollowSettings
    from torchspec_hpc.export.follow import follow as follow_run
    from torchspec_hpc.export.prompts import load_prompts

    run = RunDir(run_dir)
    sets = [load_prompts(name, limit) for name in prompts or ("chat", "code")]
    target = load_config(run.config).model.target_model_path
    settings = FollowSettings(
        serve=ServeSettings(target, max_tokens, max_model_len, tensor_parallel_size=tp_size),
        cases=[Case(prompt_set, concurrency=concurrency) for prompt_set in sets],
        num_speculative_tokens=num_speculative_tokens,
        every=every,
    )
    follow_run(run, settings)
