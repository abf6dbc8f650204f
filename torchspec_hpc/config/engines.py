"""Which values of ``inference.engine`` work: asked before queueing, and by the engine rank."""

from __future__ import annotations

from torchspec_hpc.errors import ConfigError

#: Engines that work; the schema knows the reference system's other names, too.
IMPLEMENTED_ENGINES = ("vllm", "hf")


def require_implemented(engine: str) -> None:
    """Refuses an engine that is only a name so far.

    Raises:
        ConfigError: The engine does not exist yet.
    """
    if engine not in IMPLEMENTED_ENGINES:
        raise ConfigError(
            f"inference.engine is {engine}, which has no implementation yet",
            allowed=", ".join(IMPLEMENTED_ENGINES),
            hint="set inference.engine=vllm",
        )
