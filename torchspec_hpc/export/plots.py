"""Curves of an evaluation: PNG files and TensorBoard, from the JSON that it writes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torchspec_hpc.errors import UserError

Row = dict[str, Any]


def write_plots(results: list[Row], folder: Path) -> list[Path]:
    """Draws acceptance by k, acceptance by position, and speed by conversations in flight.

    Args:
        results: ``results`` of the evaluation's JSON.
        folder: Takes the PNG files.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drafted = [row for row in results if row["num_speculative_tokens"]]
    files = []
    for prompts in dict.fromkeys(row["prompts"] for row in results):
        rows = [row for row in drafted if row["prompts"] == prompts]
        if rows:
            files.append(_accept_len(rows, folder / f"accept_len_{prompts}.png"))
            files.append(_by_position(rows, folder / f"by_position_{prompts}.png"))
        every = [row for row in results if row["prompts"] == prompts]
        files.append(_speed(every, folder / f"tokens_per_s_{prompts}.png"))
    return files


def require_matplotlib() -> None:
    """Raises before an hour of engines, not after.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(
            "--plots needs matplotlib", hint="pip install 'torchspec_hpc[plots]'"
        ) from None
    mpl.use("Agg")


def write_tensorboard(results: list[Row], folder: Path) -> None:
    """Writes each draft as a run of its own; k is the step."""
    from torch.utils.tensorboard import SummaryWriter

    for name in dict.fromkeys(row["name"] for row in results):
        with SummaryWriter(str(folder / name)) as writer:
            for row in (row for row in results if row["name"] == name):
                step, where = row["num_speculative_tokens"], _label(row, name_it=False)
                writer.add_scalar(f"served_accept_len/{where}", row["accept_len"], step)
                writer.add_scalar(f"served_tokens_per_s/{where}", row["tokens_per_s"], step)
                for position, share in enumerate(row["accept_by_position"], 1):
                    writer.add_scalar(f"served_by_position/{where} k {step}", share, position)


def _accept_len(rows: list[Row], path: Path) -> Path:
    """Lines over k; the bars are bootstrap intervals."""
    figure, axes = _figure("draft tokens proposed, k", "acceptance length (bonus included)")
    for label, group in _grouped(rows, by_k=True).items():
        ks = [row["num_speculative_tokens"] for row in group]
        lengths = [row["accept_len"] for row in group]
        ends = [row["accept_len_interval"] or (row["accept_len"],) * 2 for row in group]
        below = [length - low for length, (low, _) in zip(lengths, ends, strict=True)]
        above = [high - length for length, (_, high) in zip(lengths, ends, strict=True)]
        # the interval is of what requests report, the length of the engine's own counters
        bars = [[max(0.0, b) for b in below], [max(0.0, a) for a in above]]
        axes.errorbar(ks, lengths, yerr=bars, marker="o", capsize=3, label=label)
    return _save(figure, axes, path)


def _by_position(rows: list[Row], path: Path) -> Path:
    """Lines over positions, of the largest k of each draft."""
    figure, axes = _figure("position in the draft", "share accepted")
    for label, group in _grouped(rows, by_k=True).items():
        shares = group[-1]["accept_by_position"]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set_ylim(0, 1)
    return _save(figure, axes, path)


def _speed(rows: list[Row], path: Path) -> Path:
    figure, axes = _figure("conversations in flight", "tokens/s")
    for label, group in _grouped(rows, by_k=False).items():
        ordered = sorted(group, key=lambda row: float(row["concurrency"]))
        x, y = (
            [row["concurrency"] for row in ordered],
            [row["tokens_per_s"] for row in ordered],
        )
        axes.plot(x, y, marker="o", label=label)
    axes.set_ylim(bottom=0)
    return _save(figure, axes, path)


def _grouped(rows: list[Row], *, by_k: bool) -> dict[str, list[Row]]:
    """Rows that make one line, in the order of k."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["num_speculative_tokens"])):
        if by_k:
            groups[_label(row, name_it=True)].append(row)
        else:
            k = row["num_speculative_tokens"]
            name = f"{row['name']}, k = {k}" if k else row["name"]
            groups[f"{name}, temperature {row['temperature']:g}"].append(row)
    return groups


def _label(row: Row, *, name_it: bool) -> str:
    start = row["name"] if name_it else row["prompts"]
    return f"{start}, temperature {row['temperature']:g}, {row['concurrency']} in flight"


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path
