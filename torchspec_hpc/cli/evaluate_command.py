"""``torchspec-hpc evaluate``: measure, print a table, write JSON."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.evaluate import Measurement, ServeSettings, measure, read_prompts

BASELINE = "no draft"


def evaluate_command(
    settings: ServeSettings,
    prompts: Path,
    drafts: list[str],
    *,
    baseline: bool,
    limit: int | None,
    output: Path | None,
) -> None:
    """Measures the target alone, then each draft, and prints one row for each."""
    named = [parse_draft(text) for text in drafts]
    if not named and not baseline:
        raise UserError("nothing to evaluate", hint="give --draft DIR, or leave out --no-baseline")
    messages = read_prompts(prompts, limit)
    console = Console()
    folder = output.parent if output else Path(tempfile.mkdtemp(prefix="torchspec-evaluate-"))
    log = folder / "evaluate.log"
    results: list[Measurement] = []
    todo: list[tuple[str, Path | None]] = [(BASELINE, None)] if baseline else []
    for name, draft in [*todo, *named]:
        with console.status(f"{name}: {len(messages)} prompts in vLLM (log: {log})"):
            results.append(measure(settings, messages, name=name, draft=draft, log=log))
        console.print(f"{name}: {results[-1].tokens_per_s:.1f} tokens/s")
    figures = to_json(results, settings, prompts)
    console.print(served_table(figures))
    if output:
        write_atomic(output, figures)


def parse_draft(text: str) -> tuple[str, Path]:
    """Splits ``NAME=DIR``; the name defaults to the directory's."""
    name, separator, folder = text.partition("=")
    path = Path(folder if separator else text)
    return (name if separator else path.name), path


def to_json(results: list[Measurement], settings: ServeSettings, prompts: Path) -> dict[str, Any]:
    """What ``--output`` writes; answers are compared with those of the target alone."""
    reference = results[0] if results[0].name == BASELINE else None
    rows = []
    for result in results:
        same = result.same_outputs(reference) if reference else None
        rows.append(result.summary() | {"same_answers": same})
    return {"prompts": str(prompts), "settings": asdict(settings), "results": rows}


def served_table(figures: dict[str, Any]) -> Table:
    """One row a measurement, from what :func:`to_json` returns."""
    settings = figures["settings"]
    k, concurrency = settings["num_speculative_tokens"], settings["concurrency"]
    table = Table(title=f"Served in vLLM, k = {k}, {concurrency} in flight")
    for column in ("draft", "acceptance length", "by position", "tokens/s", "same answers"):
        table.add_column(column, justify="left" if column == "draft" else "right")
    for row in figures["results"]:
        positions = " ".join(f"{share:.2f}" for share in row["accept_by_position"]) or "-"
        same = "-" if row["same_answers"] is None else f"{row['same_answers']:.0%}"
        speed = f"{row['tokens_per_s']:.1f}"
        table.add_row(row["name"], f"{row['accept_len']:.3f}", positions, speed, same)
    table.caption = "acceptance length counts the bonus token: 1 + accepted / drafts"
    return table
