"""The part of our SGLang engine that SGLang loads into its own processes: a forward hook.

SGLang attaches it, by its argument ``forward_hooks``, to the target's final norm, which shows the
residual stream after the last layer, and to the logits processor, which is handed the aux layers
and the batch.  Both run in every pass, the norm first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.inference.delivery import Delivery, Destination

#: Begins the ids of our requests; SGLang has some of its own.
_PREFIX = "torchspec_hpc:"


class _About(msgspec.Struct):
    num_tokens: int
    destination: Destination


def request_id(destination: Destination, num_tokens: int) -> str:
    """The id of a request, which tells SGLang's scheduler process all it needs."""
    return _PREFIX + msgspec.json.encode(_About(num_tokens, destination)).decode()


def capture_hook(config: dict[str, Any]) -> CaptureHook | None:
    """What ``forward_hooks`` names; SGLang calls it once the target is loaded.

    Args:
        config: ``run_dir``, where configuration and endpoints are; inference ``rank``; ``columns``:
            which captured layers make up the states, in order.

    Returns:
        None on all ranks of tensor parallelism but the first: every rank has the same rows.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return None
    run = RunDir(config["run_dir"])
    settings = load_config(run.config)
    endpoints = Endpoints.read(run, settings.control.service_ready_s)
    delivery = Delivery.open(settings, run, endpoints, config["rank"])
    return CaptureHook(delivery, config["columns"])


class CaptureHook:
    """Collects the rows of each prompt, however SGLang cuts it, and delivers them when complete.

    Args:
        delivery: Takes what is complete.
        columns: Which captured layers make up the states: the aux layers and then the last one
            count from 0.
    """

    def __init__(self, delivery: Delivery, columns: Sequence[int]) -> None:
        self._delivery, self._columns = delivery, list(columns)
        self._last: Tensor | None = None
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Called after the final norm, and then after the logits processor."""
        if len(inputs) < 4:  # the norm: (states) or (states, residual)
            # with a residual it adds first, and returns the sum beside what it is named after
            self._last = output[1] if isinstance(output, tuple) else inputs[0]
            return
        _, _, _, batch, *aux = inputs
        if batch.forward_mode.is_extend():
            self._take(batch, self._captured(aux[0] if aux else None))

    def _captured(self, aux: Tensor | Sequence[Tensor] | None) -> Tensor:
        """All captured layers [tokens of the batch, layers, H]."""
        last, self._last = self._last, None
        if last is None:
            raise RuntimeError(
                "SGLang's logits processor ran and the hook on the final norm did not: this "
                "target keeps its norm elsewhere; use inference.engine=vllm"
            )
        if isinstance(aux, Tensor):  # packed: [tokens, layers * H]
            aux = aux.view(last.shape[0], -1, last.shape[1]).unbind(dim=1)
        return torch.stack([*(aux or ()), last], dim=1)

    def _take(self, batch: Any, captured: Tensor) -> None:
        """Takes each request's rows out of a batch, in which they lie one after the other."""
        end = 0
        lengths = zip(
            batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True
        )
        for rid, num_before, num_rows in lengths:
            start, end = end, end + num_rows
            if rid.startswith(_PREFIX):
                self._add(rid, num_before, captured[start:end, self._columns])

    def _add(self, rid: str, num_before: int, rows: Tensor) -> None:
        """Adds rows of a prompt, of which so many came before; begins again where none did."""
        about = msgspec.json.decode(rid.removeprefix(_PREFIX), type=_About)
        if num_before == 0:
            self._parts[rid] = []
        parts = self._parts[rid]
        parts.append(rows)
        if num_before + len(rows) == about.num_tokens:
            del self._parts[rid]
            states = rows if len(parts) == 1 else torch.cat(parts)
            self._delivery.submit(about.destination, states)
