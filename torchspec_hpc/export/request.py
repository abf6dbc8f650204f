"""What a user asks of an export, and how a run's own configuration fills in what was not said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.rundir import cache_dir
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.config.types import Dtype
from torchspec_hpc.drafts.eagle3.formats import DraftFormat, Served
from torchspec_hpc.errors import UserError
from torchspec_hpc.export import pruning
from torchspec_hpc.export.checkpoint import DraftCheckpoint, read_checkpoint, untrained
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft
from torchspec_hpc.target.spec import TargetSpec


@dataclass(frozen=True)
class DataRequest:
    """The data that a vocabulary is chosen from; None: as the run has it.

    Attributes:
        dataset_path: Conversations.
        tokenizer: Model whose tokenizer counts.
        chat_template: As in ``dataset.chat_template``.
        prompt_key: Column of the turns.
        max_seq_length: Tokens of a sample.
        cache_dir: Of prepared data.
    """

    dataset_path: Path | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    prompt_key: str | None = None
    max_seq_length: int | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        source: Run, ``checkpoints`` directory, one checkpoint, or ``checkpoints/best``.
        output: Where to; None: ``<run>/export/step_<n>``.
        draft_format: For whom.
        dtype: Of the written weights.
        target: What the card and the speculators format call the target; None: as trained.
        num_speculative_tokens: k that they name.
        draft_vocab_size: Prune the head to so many rows; None: as trained.
        data: To choose them from.
        untrained: The weights before the first step, for comparison.
        replace: Overwrite an earlier export.
    """

    source: Path
    output: Path | None = None
    draft_format: DraftFormat = "hf"
    dtype: Dtype = "bfloat16"
    target: str | None = None
    num_speculative_tokens: int = 3
    draft_vocab_size: int | None = None
    data: DataRequest = DataRequest()
    untrained: bool = False
    replace: bool = False


def run_export(request: ExportRequest) -> Path:
    """Writes the draft; returns its directory.

    Raises:
        UserError: Checkpoint, data or output cannot be used.
        ContractError: The checkpoint is no draft that could be served.
    """
    checkpoint = read_checkpoint(request.source)
    run = _run_of(checkpoint)
    if request.untrained:
        config = load_config(run.config)
        checkpoint = untrained(checkpoint, config.model, config.training.seed)
    if request.draft_vocab_size is not None:
        data = counted_data(checkpoint, request.data)
        kept = pruning.choose_vocabulary(data, checkpoint, request.draft_vocab_size)
        checkpoint = pruning.prune(checkpoint, kept)
    served = _served(checkpoint, request)
    options = ExportOptions(served, request.draft_format, request.dtype, request.replace)
    output = request.output or run.export / f"step_{checkpoint.meta.step}"
    return export_draft(checkpoint, output, options)


def analyze_vocabulary(source: Path, data: DataRequest) -> pruning.Coverage:
    """Coverage of the data by size of the draft vocabulary; writes nothing."""
    checkpoint = read_checkpoint(source)
    vocab_size = checkpoint.meta.draft["config"]["vocab_size"]
    return pruning.analyze(counted_data(checkpoint, data), vocab_size)


def counted_data(checkpoint: DraftCheckpoint, asked: DataRequest) -> pruning.CountedData:
    """The data to count: what was asked for, else what the run was trained on.

    With the run's own settings the tokens that training has prepared are used again.

    Raises:
        UserError: The checkpoint lies away from its run, and not everything was asked for.
    """
    run = _run_of(checkpoint)
    if run.config.is_file():
        config = load_config(run.config)
        dataset, model = config.dataset, config.model
        max_seq_length = asked.max_seq_length or config.training.max_seq_length
        cache = asked.cache_dir or cache_dir(config)
    else:
        if asked.dataset_path is None or asked.max_seq_length is None or asked.cache_dir is None:
            raise UserError(
                f"{checkpoint.path} lies away from its run, whose settings say what to count",
                hint="give --dataset-path, --max-seq-length and --cache-dir",
            )
        dataset = DatasetConfig(train_data_path=str(asked.dataset_path))
        model = ModelConfig(target_model_path=checkpoint.meta.target)
        max_seq_length, cache = asked.max_seq_length, asked.cache_dir
    return pruning.CountedData(
        dataset=dataset.model_copy(
            update=_given(
                train_data_path=asked.dataset_path,
                chat_template=asked.chat_template,
                prompt_key=asked.prompt_key,
            )
        ),
        model=model.model_copy(update=_given(target_model_path=asked.tokenizer)),
        max_seq_length=max_seq_length,
        cache_dir=cache,
    )


def _given(**values: str | Path | None) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def _run_of(checkpoint: DraftCheckpoint) -> RunDir:
    return RunDir(checkpoint.path.parent.parent)


def _served(checkpoint: DraftCheckpoint, request: ExportRequest) -> Served:
    """What the export says of serving; only the speculators format names an architecture."""
    trained_for, k = checkpoint.meta.target, request.num_speculative_tokens
    wanted = request.draft_format == "speculators"
    architecture = TargetSpec.from_path(trained_for).architecture if wanted else ""
    return Served(request.target or trained_for, architecture, k)
