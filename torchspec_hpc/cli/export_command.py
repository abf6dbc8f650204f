"""``torchspec-hpc export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from torchspec_hpc.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from torchspec_hpc.export.pruning import Coverage

# config.types.Dtype and drafts.eagle3.formats.DraftFormat again: importing them would double the
# time of --help
Dtype = Literal["bfloat16", "float16", "float32"]
DraftFormat = Literal["hf", "speculators"]
VOCABULARY = "Draft vocabulary"


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run, checkpoint, or RUN/checkpoints/best.")
    ],
    output: Annotated[Path | None, typer.Option(help="Default: RUN/export/step_<n>.")] = None,
    draft_format: Annotated[
        DraftFormat,
        typer.Option("--format", help="hf: for vLLM and SGLang; speculators: vllm serve DRAFT."),
    ] = "hf",
    dtype: Annotated[Dtype, typer.Option(help="Of the written weights.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an export.")] = False,
    target: Annotated[
        str | None, typer.Option(help="The target's name for the card; default: as trained.")
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("-k", min=1, help="Draft tokens that the commands of the card name.")
    ] = 3,
    untrained: Annotated[
        bool, typer.Option(help="Export the draft as it was before the first step.")
    ] = False,
    prune_vocab: Annotated[
        bool,
        typer.Option(
            "--prune-vocab",
            help="Keep the --draft-vocab-size most frequent tokens of the data.",
            rich_help_panel=VOCABULARY,
        ),
    ] = False,
    draft_vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens to keep.", rich_help_panel=VOCABULARY)
    ] = None,
    analyze_vocab: Annotated[
        bool,
        typer.Option(
            "--analyze-vocab",
            help="Print the coverage of the data by size, and export nothing.",
            rich_help_panel=VOCABULARY,
        ),
    ] = False,
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="Default: the run's training data.", rich_help_panel=VOCABULARY),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Default: the run's target.", rich_help_panel=VOCABULARY)
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Default: the run's.", rich_help_panel=VOCABULARY)
    ] = None,
    prompt_key: Annotated[
        str | None, typer.Option(help="Default: the run's.", rich_help_panel=VOCABULARY)
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(min=4, help="Default: the run's.", rich_help_panel=VOCABULARY)
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Of tokenized data; default: the run's.", rich_help_panel=VOCABULARY),
    ] = None,
) -> None:
    """Write a draft directory that vLLM and SGLang serve."""
    from torchspec_hpc.export.request import (
        DataRequest,
        ExportRequest,
        analyze_vocabulary,
        run_export,
    )

    data = DataRequest(
        dataset_path, tokenizer, chat_template, prompt_key, max_seq_length, cache_dir
    )
    if analyze_vocab:
        from rich.console import Console

        Console().print(coverage_table(analyze_vocabulary(source, data)))
        return
    if prune_vocab != (draft_vocab_size is not None):
        raise UserError(
            "--prune-vocab and --draft-vocab-size go together",
            hint="--analyze-vocab shows what a size covers",
        )
    request = ExportRequest(
        source=source,
        output=output,
        draft_format=draft_format,
        dtype=dtype,
        target=target,
        num_speculative_tokens=num_speculative_tokens,
        draft_vocab_size=draft_vocab_size,
        data=data,
        untrained=untrained,
        replace=force,
    )
    print(run_export(request))


def coverage_table(coverage: Coverage) -> Table:
    """One row a size of the draft vocabulary."""
    from rich.table import Table

    table = Table(title=f"{coverage.num_tokens:,} supervised tokens of the data")
    for column in ("draft vocabulary", "covers", ""):
        table.add_column(column, justify="right")
    notes = {coverage.num_different: "all that occur", coverage.vocab_size: "the target's"}
    for size, share in coverage.by_size:
        table.add_row(f"{size:,}", f"{share:.2%}", notes.get(size, ""))
    table.caption = "a token outside is never drafted: take the smallest size that covers 99 %"
    return table
