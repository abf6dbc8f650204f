"""``torchspec-hpc data``: look at data, prepare them, and have the target answer them anew."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchspec_hpc.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from torchspec_hpc.config import Config
    from torchspec_hpc.data.report import DatasetReport
    from torchspec_hpc.data.shards import TokenDataset
    from torchspec_hpc.data.summary import Summary

app = typer.Typer(
    name="data", help="Inspect, prepare and regenerate training data.", no_args_is_help=True
)

Strict = Annotated[bool, typer.Option("--strict", help="One bad row is an error.")]


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    strict: Strict = False,
) -> None:
    """Tokenize the data of a run now, so that the run opens them at once."""
    from torchspec_hpc.config import load_config

    settings = load_config(config, _options(overrides, strict))
    paths = [settings.dataset.train_data_path, settings.dataset.eval_data_path]
    for path in paths:
        if path is not None:
            prepared = _prepare(settings, path)
            print(f"{path}\n  {prepared.report.summary()}\n  {prepared.folder}")


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="DATA", help="File, directory, hf://..., or prepared data.")
    ],
    config: Annotated[Path, typer.Option("--config", help="YAML file of the run.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to print.")] = 2,
    seed: Annotated[int, typer.Option(help="Which samples: a random choice.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens printed of a sample.")] = 400,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="Throughput, for the hours of an epoch.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Print samples with their supervised tokens marked, lengths, bad rows, packing and cost."""
    from rich.console import Console

    from torchspec_hpc.config import load_config
    from torchspec_hpc.data.dataset import require_usable
    from torchspec_hpc.data.shards import INDEX, TokenDataset

    settings = load_config(config, _options(overrides, strict))
    is_prepared = (Path(source) / INDEX).is_file()
    dataset = TokenDataset(Path(source)) if is_prepared else _prepare(settings, source)
    if is_prepared and strict:
        require_usable(dataset, settings.dataset.max_rejected_share, source)
    console = Console(highlight=False)
    _print_samples(console, settings, dataset, samples, seed, max_tokens)
    summary = _summarize(settings, dataset, tokens_per_s)
    console.print(_lengths_table(summary))
    console.print(_figures_table(dataset, summary))
    if dataset.report.rejected:
        console.print(_rejected_table(dataset.report))


@app.command()
def regenerate(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Conversations or prompts.")],
    output: Annotated[Path, typer.Argument(help="JSON lines; the same call goes on with them.")],
    model: Annotated[str, typer.Option(help="Target: directory, hub id, or name at the server.")],
    server: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server; default: vLLM here.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, thinking included.")
    ] = 2048,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="1: off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of every request; no effect when greedy.")] = 0,
    keep_loops: Annotated[
        bool, typer.Option("--keep-loops", help="Keep answers that run in circles.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens, prompt and answer; default: the model's.")
    ] = None,
    tp_size: Annotated[int, typer.Option(min=1, help="GPUs of the engine.")] = 1,
    template_kwargs: Annotated[
        str,
        typer.Option(help='JSON of variables of the chat template: {"enable_thinking": false}.'),
    ] = "{}",
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that --server may take for an answer.")
    ] = 600.0,
    max_minutes: Annotated[float, typer.Option(help="Then no new row is begun.")] = 1e9,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
    ] = False,
) -> None:
    """Have the target answer prompts, or the questions of conversations, anew."""
    import os

    from torchspec_hpc.data.answerers import AnswerSettings, start_offline
    from torchspec_hpc.data.regenerate import regenerate as run
    from torchspec_hpc.data.server import Server

    settings = AnswerSettings(
        model,
        max_tokens,
        temperature,
        top_p,
        seed,
        keep_loops,
        concurrency,
        _json_object(template_kwargs),
    )
    answerer = (
        Server(server, settings, os.environ.get("OPENAI_API_KEY", ""), timeout)
        if server
        else start_offline(
            settings,
            max_model_len=max_model_len,
            tp_size=tp_size,
            trust_remote_code=trust_remote_code,
        )
    )
    outcome = run(source, output, settings, answerer, max_minutes)
    for reason, count in sorted(outcome.reasons.items()):
        print(f"{count:8d}  {reason}")
    print(
        f"{outcome.done} done + {outcome.failed} failed + {outcome.skipped} skipped "
        f"+ {outcome.not_started} not started = {outcome.num_input} rows"
    )
    print(outcome.cut)
    if outcome.failed:
        raise typer.Exit(1)


def _json_object(text: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r}; allowed: a JSON object")
    return value


def _options(overrides: list[str] | None, strict: bool) -> list[str]:
    return [*(overrides or ()), *(["dataset.max_rejected_share=0.0"] if strict else ())]


def _prepare(settings: Config, path: str) -> TokenDataset:
    from torchspec_hpc.config.rundir import cache_dir
    from torchspec_hpc.data.dataset import prepare_dataset

    length = settings.training.max_seq_length
    return prepare_dataset(path, settings.dataset, settings.model, length, cache_dir(settings))


def _summarize(settings: Config, dataset: TokenDataset, tokens_per_s: float | None) -> Summary:
    from torchspec_hpc.data.summary import summarize
    from torchspec_hpc.target.spec import TargetSpec

    spec = TargetSpec.from_path(settings.model.target_model_path)
    num_states = len(spec.aux_layers(settings.inference.aux_hidden_states_layers)) + 1
    dtype = settings.inference.dtype
    item_bytes = 4 if (spec.dtype if dtype == "auto" else dtype) == "float32" else 2
    token_bytes = num_states * spec.hidden_size * item_bytes
    shuffle = settings.dataset.shuffle_dataset
    return summarize(dataset, settings.training, token_bytes, tokens_per_s, shuffle=shuffle)


def _print_samples(
    console: Console,
    settings: Config,
    dataset: TokenDataset,
    num: int,
    seed: int,
    max_tokens: int,
) -> None:
    """Text of some samples; what is supervised is green, or in brackets where there is no color."""
    import random

    from rich.text import Text

    from torchspec_hpc.target.tokenizer import load_decoder

    decode = load_decoder(settings.model)
    left, right = ("", "") if console.is_terminal else ("\u27e6", "\u27e7")
    for index in sorted(random.Random(seed).sample(range(len(dataset)), min(num, len(dataset)))):  # noqa: S311
        sample = dataset[index]
        ids, mask = sample.input_ids[:max_tokens], sample.loss_mask[:max_tokens]
        file = dataset.report.files[dataset.column("file")[index]]
        line = dataset.column("line")[index]
        said = int(sample.loss_mask.sum())
        console.rule(f"{Path(file).name} line {line}: {len(sample.input_ids)} tokens, {said} said")
        text = Text()
        for start, end, supervised in runs(mask.tolist()):
            words = decode(ids[start:end].tolist())
            text.append(f"{left}{words}{right}", "bold green") if supervised else text.append(words)
        console.print(text)


def runs(mask: list[bool]) -> list[tuple[int, int, bool]]:
    """Stretches of equal values: start, end, value."""
    borders = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return [(a, b, mask[a]) for a, b in pairwise([0, *borders, len(mask)]) if b > a]


def _lengths_table(summary: Summary) -> Table:
    from rich.table import Table

    table = Table(title="Lengths of samples, tokens")
    table.add_column("tokens", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("")
    most = max(count for _, _, count in summary.histogram)
    for low, high, count in summary.histogram:
        table.add_row(f"{low} - {high}", str(count), "#" * round(40 * count / most))
    return table


def _figures_table(dataset: TokenDataset, summary: Summary) -> Table:
    from rich.table import Table

    report = dataset.report
    table = Table(title=report.loss_mask, show_header=False)
    rows = {
        "samples / rows": f"{report.num_samples} / {report.num_rows}",
        "rejected": f"{report.num_rejected} ({report.rejected_share:.2%})",
        "truncated": f"{report.truncated}",
        "earlier answers left out": f"{report.changed_answers}",
        "tokens": f"{report.num_tokens} (mean {summary.mean_length:.1f} a sample)",
        "supervised": f"{report.num_supervised} ({summary.supervised_share:.1%})",
        "micro-batches an epoch": f"{summary.num_packs} of at most {summary.pack_tokens} tokens",
        "packing": f"{summary.filled:.1%} filled",
        "hidden states": f"{summary.state_bytes / 2**30:.2f} GiB an epoch, "
        f"{summary.pack_bytes / 2**20:.1f} MiB a micro-batch",
    }
    if summary.hours is not None:
        rows["time"] = f"{summary.hours:.2f} hours an epoch"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _rejected_table(report: DatasetReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Rows left out")
    for name in ("rows", "first at", "reason"):
        table.add_column(name)
    for kind, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        first = report.examples[kind]
        table.add_row(str(count), f"{Path(first.file).name}:{first.line}", Text(first.reason))
    return table
