"""What can be known to be wrong before a job waits in the queue for it."""

from __future__ import annotations

from pathlib import Path

from torchspec_hpc.config.engines import require_implemented
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError, DataError, UserError
from torchspec_hpc.observe.wandb_board import require_wandb
from torchspec_hpc.target.spec import TargetSpec


def check_inputs(config: Config) -> None:
    """Looks at the files that a configuration names, in well under a second and without torch.

    A hub id is left to the nodes: their cache may hold what the login node's does not.

    Raises:
        ConfigError: The engine has no implementation, a package or a file is missing, or the
            shapes asked for do not fit the target.
        DataError: A data file is missing.
    """
    dataset, model, training = config.dataset, config.model, config.training
    require_implemented(config.inference.engine)
    if (config.cluster, config.inference.num_engines) == ("slurm", 0):
        _require_single(config.slurm.topology)
    if "wandb" in config.logging.report_to and config.slurm.python is None:
        require_wandb()  # the nodes have this interpreter
    _require_file("dataset.train_data_path", dataset.train_data_path, DataError)
    _require_file("dataset.eval_data_path", dataset.eval_data_path, DataError)
    _require_file("dataset.chat_template", dataset.chat_template, ConfigError)
    _require_file("model.draft_model_config", model.draft_model_config, ConfigError)
    _require_file("training.load_path", training.load_path, ConfigError)
    if model.initial_draft is not None and Path(model.initial_draft).is_absolute():
        _require_file("model.initial_draft", model.initial_draft, ConfigError)
    if not Path(model.target_model_path).is_absolute():
        return
    spec = TargetSpec.from_path(model.target_model_path)
    spec.aux_layers(config.inference.aux_hidden_states_layers)
    if model.draft_vocab_size is not None and model.draft_vocab_size > spec.vocab_size:
        raise ConfigError(
            f"model.draft_vocab_size = {model.draft_vocab_size}",
            allowed=f"1 to {spec.vocab_size}, the target's vocabulary, or null for all of it",
        )
    if training.max_seq_length > spec.max_position_embeddings:
        raise ConfigError(
            f"training.max_seq_length = {training.max_seq_length}",
            allowed=f"up to {spec.max_position_embeddings}, the target's max_position_embeddings",
        )


def _require_single(topology: str) -> None:
    """A job without engines has one component, with the trainers' nodes."""
    if topology != "single":
        raise ConfigError(
            f"inference.inference_num_gpus = 0 with slurm.topology = {topology}, which is of two "
            "groups",
            hint="set slurm.topology=single, and slurm.inference as slurm.training",
        )


def _require_file(key: str, path: str | None, error: type[UserError]) -> None:
    if path is not None and not Path(path).exists():
        raise error(f"{key} = {path}: no such file", hint="check the path; every node must see it")
