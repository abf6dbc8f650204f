"""From the name in the configuration to a running engine; only that engine is imported."""

from __future__ import annotations

import importlib
from typing import cast

from torchspec_hpc.config.engines import require_implemented
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import Engine, EngineContext

#: Module and class of each engine that works; an adapter for another one is one more file here,
#: and its name in ``config.engines``.
_ENGINES = {
    "vllm": ("torchspec_hpc.inference.engines.vllm", "VllmEngine"),
    "hf": ("torchspec_hpc.inference.engines.hf", "HfEngine"),
    "sglang": ("torchspec_hpc.inference.engines.sglang", "SglangEngine"),
}
#: What brings an engine's packages.
_INSTALL = {
    "vllm": "pip install 'torchspec_hpc[vllm]' on GPU nodes, 'torchspec_hpc[cpu]' without",
    "sglang": "pip install 'torchspec_hpc[sglang]' on GPU nodes",
}


def create_engine(context: EngineContext) -> Engine:
    """Builds the engine that the configuration names and loads the target.

    Raises:
        ConfigError: The engine does not exist yet, is not installed, or refuses
            the target or its settings.
    """
    name = context.config.inference.engine
    require_implemented(name)
    module, attribute = _ENGINES[name]
    try:
        return cast("Engine", getattr(importlib.import_module(module), attribute)(context))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "torchspec_hpc":
            raise
        raise ConfigError(
            f"inference.engine is {name} and the package {missing} is not installed",
            hint=_INSTALL.get(name, f"pip install {missing}"),
        ) from error
