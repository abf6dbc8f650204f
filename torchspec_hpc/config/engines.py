"""Which values of ``inference.engine`` work: asked before queueing, and by the engine rank."""

from __future__ import annotations

from torchspec_hpc.errors import ConfigError

#: Engines that work; the schema knows the reference system's other names, too.
IMPLEMENTED_ENGINES = ("vllm", "hf", "sglang")
#: What the others would need first.
_MISSING = {
    "tokenspeed": "TokenSpeed 0.1.1 hands no hidden states out: its engine takes "
    "return_hidden_states and answers with an empty list, it captures aux layers only for a draft "
    "of its own, and it has no place for a hook",
}


def require_implemented(engine: str) -> None:
    """Refuses an engine that is only a name so far.

    Raises:
        ConfigError: The engine cannot do what is asked of it yet.
    """
    if engine not in IMPLEMENTED_ENGINES:
        raise ConfigError(
            f"inference.engine is {engine}, which cannot work yet. {_MISSING[engine]}",
            allowed=", ".join(IMPLEMENTED_ENGINES),
            hint="set inference.engine=vllm; what an adapter needs is in docs/engines.md",
        )
