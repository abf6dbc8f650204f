"""Finds a model's files: in a directory, or in the Hugging Face hub and its cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchspec_hpc.errors import ConfigError


def model_file(model_path: str, name: str, setting: str = "model.target_model_path") -> Path | None:
    """Returns the local path of one file of a model.

    Args:
        model_path: Directory of the model or its hub id.
        name: File name inside the model, e.g. ``config.json``.
        setting: What named the model, for the message.

    Returns:
        The path, or None if the model exists and has no such file.

    Raises:
        ConfigError: There is no such model, or the hub cannot be reached.
    """
    directory = Path(model_path)
    if directory.is_dir():
        return path if (path := directory / name).is_file() else None
    if directory.is_absolute() or model_path.startswith("."):
        raise ConfigError(
            f"{setting} = {model_path}: no such directory",
            allowed="a directory with config.json and *.safetensors, or a hub id such as org/name",
            hint="check the path; on a cluster it has to be on a file system that all nodes share",
        )
    return _hub_file(model_path, name, setting)


def _hub_file(repo_id: str, name: str, setting: str) -> Path | None:
    # imported here: only hub ids need it
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo_id, name))
    except LocalEntryNotFoundError as error:
        # offline and not in the cache; also an EntryNotFoundError, so it comes first
        raise _unreachable(repo_id, name, setting, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _unreachable(repo_id, name, setting, error) from error


def _unreachable(repo_id: str, name: str, setting: str, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"{setting} = {repo_id} is no directory here, and its {name} cannot be "
        f"had from the Hugging Face hub: {reason}",
        allowed="a model directory, or a hub id that this machine can download or has in its cache",
        hint=f"where there is a network: hf download {repo_id}; compute nodes then read the cache",
    )


def fingerprint(model_path: str) -> str:
    """Changes when the files of a model do; quick, so contents of weights are not read.

    Args:
        model_path: Directory of the model or its hub id.

    Raises:
        ConfigError: There is no such model.
    """
    config = model_file(model_path, "config.json")
    if config is None:
        raise ConfigError(f"model.target_model_path = {model_path} has no config.json")
    if not Path(model_path).is_dir():
        return config.parent.name  # in the hub's cache: the commit
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(config.parent.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".pt", ".py"):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
