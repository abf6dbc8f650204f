"""The target's tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.files import model_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the target.

    Args:
        model: ``target_model_path`` is a directory or a hub id.
        chat_template: Path of a Jinja template that replaces the tokenizer's own.

    Returns:
        A tokenizer that knows character offsets and has a chat template.

    Raises:
        ConfigError: There is no such tokenizer, it is not a fast one, or there is no chat template.
    """
    # takes seconds and pulls torch where that is installed: only who tokenizes should pay
    from transformers import AutoTokenizer

    path = model.target_model_path
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ConfigError(
            f"model.target_model_path: there is no directory {path}",
            hint="download the model there, or name it by its hub id (organisation/name)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # tokenizers raises just that for a file it cannot read
        raise ConfigError(
            f"cannot load a tokenizer from {path}: {type(error).__name__}: {error}",
            allowed="a directory with tokenizer.json, or a hub id",
            hint="check model.target_model_path (and trust_remote_code, if the model needs it)",
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {path} ({type(tokenizer).__name__}) has no character offsets",
            allowed="a fast tokenizer, one with a tokenizer.json",
            hint="save a converted one into the model directory",
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    require_chat_template(tokenizer, path)
    return tokenizer


def load_decoder(model: ModelConfig) -> Callable[[list[int]], str]:
    """What turns token ids into text, special tokens too; without importing transformers.

    Raises:
        ConfigError: The target has no tokenizer.json.
    """
    from tokenizers import Tokenizer

    path = model_file(model.target_model_path, "tokenizer.json")
    if path is None:
        raise ConfigError(
            f"{model.target_model_path} has no tokenizer.json",
            hint="save a fast tokenizer into the model directory",
        )
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def require_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Text of the chat template.

    Raises:
        ConfigError: There is none, or several and none is called ``default``.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"the tokenizer of {name} has no chat template to use: {str(error).split('. ')[0]}",
            hint="set dataset.chat_template to a Jinja file; base models have none of their own",
        ) from None


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"dataset.chat_template: cannot read {path}: {error}", hint="check the path"
        ) from error
    if not text.strip():
        raise ConfigError(f"dataset.chat_template: {path} is empty")
    return text
