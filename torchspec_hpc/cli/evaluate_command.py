"""``torchspec-hpc evaluate``: measure, print a table, write JSON."""

from __future__ import annotations

import json
import tempfile
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
) -> list[Measurement]:
    """Measures the target alone, then each draft, and prints one row for each."""
    named = [parse_draft(text) for text in drafts]
    if not named and not baseline:
        raise UserError("nothing to evaluate", hint="give --draft DIR, or leave out --no-baseline")
    messages = read_prompts(prompts, limit)
    console = Console()
    log = (output.parent if output else Path(tempfile.gettempdir())) / "evaluate.log"
    results: list[Measurement] = []
    todo: list[tuple[str, Path | None]] = [(BASELINE, None)] if baseline else []
    for name, folder in [*todo, *named]:
        with console.status(f"{name}: {len(messages)} prompts in vLLM (log: {log})"):
            results.append(measure(settings, messages, name=name, draft=folder, log=log))
        console.print(f"{name}: {results[-1].tokens_per_s:.1f} tokens/s")
    console.print(results_table(results, settings))
    if output:
        write_atomic(output, to_json(results, settings, prompts))
    return results


def parse_draft(text: str) -> tuple[str, Path]:
    """Splits ``NAME=DIR``; the name defaults to the directory's."""
    name, separator, folder = text.partition("=")
    path = Path(folder if separator else text)
    return (name if separator else path.name), path


def results_table(results: list[Measurement], settings: ServeSettings) -> Table:
    """One row a measurement."""
    k = settings.num_speculative_tokens
    table = Table(title=f"Served in vLLM, k = {k}, greedy, {settings.concurrency} in flight")
    for column in ("draft", "acceptance length", *(f"pos {i + 1}" for i in range(k))):
        table.add_column(column, justify="left" if column == "draft" else "right")
    table.add_column("tokens/s", justify="right")
    table.add_column("same answers", justify="right")
    reference = results[0] if results[0].name == BASELINE else None
    for result in results:
        positions = [f"{share:.2f}" for share in result.accept_by_position] or ["-"] * k
        same = f"{result.same_outputs(reference):.0%}" if reference else "-"
        speed = f"{result.tokens_per_s:.1f}"
        table.add_row(result.name, f"{result.accept_len:.3f}", *positions, speed, same)
    table.caption = "acceptance length counts the bonus token: 1 + accepted / drafts"
    return table


def to_json(results: list[Measurement], settings: ServeSettings, prompts: Path) -> dict[str, Any]:
    """What ``--output`` writes."""
    return {
        "prompts": str(prompts),
        "settings": json.loads(json.dumps(settings.__dict__)),
        "results": [result.summary() for result in results],
    }
