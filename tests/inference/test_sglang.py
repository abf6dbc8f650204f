"""The SGLang engine, as far as it goes without a GPU: SGLang itself cannot be imported here.

What it asks of SGLang is checked against the interfaces of its wheel (``recorded/sglang.json``),
its hook on a model that calls its modules as SGLang's do.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.inference.conftest import Requester, context_of, make_run, random_prompts
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.delivery import Destination
from torchspec_hpc.inference.engines import sglang
from torchspec_hpc.inference.engines.base import EngineContext, PromptRefused
from torchspec_hpc.inference.engines.sglang import SglangEngine, engine_arguments
from torchspec_hpc.inference.engines.sglang_capture import CaptureHook, capture_hook, request_id
from torchspec_hpc.transfer.messages import Receipt

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "recorded" / "sglang.json").read_text()
)
HIDDEN = 8


@pytest.fixture
def run(services: Endpoints, tmp_path: Path, tiny_target: Path) -> RunDir:
    inference = {"engine": "sglang", "sglang": {"mem_fraction_static": 0.7}}
    return make_run(tmp_path / "run", tiny_target, services, inference=inference)


@pytest.fixture
def context(run: RunDir) -> EngineContext:
    return context_of(run)


# ---- what is asked of SGLang ------------------------------------------------------------------


def test_arguments_are_those_of_the_wheel(context: EngineContext) -> None:
    arguments = engine_arguments(context)
    assert RECORDED["version"] == "0.5.23"
    assert arguments.keys() <= set(RECORDED["server_args"])
    assert sglang._MANAGED.keys() <= set(RECORDED["server_args"])
    assert arguments.keys() <= sglang._MANAGED.keys()
    assert arguments["context_length"] == 201
    assert arguments["mem_fraction_static"] == 0.7
    assert arguments["return_aux_hidden_state_layer_ids"] == [0, 1, 2]  # after layers 1, 2, 3
    (hook,) = arguments["forward_hooks"]
    assert sorted(hook) == RECORDED["hook_spec"]
    assert hook["config"]["columns"] == [0, 1, 2, 3]
    module, _, name = hook["hook_factory"].partition(":")
    assert getattr(importlib.import_module(module), name) is capture_hook
    json.dumps(arguments)  # they travel to other processes


def test_the_last_layer_may_be_an_aux_layer(services: Endpoints, tmp_path: Path, tiny_target: Path):
    def arguments(*layers: int) -> dict[str, Any]:
        inference = {"engine": "sglang", "aux_hidden_states_layers": list(layers)}
        folder = tmp_path / "-".join(map(str, layers))
        return engine_arguments(
            context_of(make_run(folder, tiny_target, services, inference=inference))
        )

    both = arguments(2, 4)
    assert both["return_aux_hidden_state_layer_ids"] == [1]
    assert both["forward_hooks"][0]["config"]["columns"] == [0, 1, 1]
    assert "speculative_algorithm" not in arguments(4)


def test_conventions_are_those_of_the_wheel(context: EngineContext) -> None:
    assert set(RECORDED["eagle3"]) - set(RECORDED["dflash"]) >= sglang._EAGLE3_ONLY
    assert engine_arguments(context)["speculative_algorithm"] == "DFLASH"
    object.__setattr__(context.spec, "architecture", "MiniMaxM2ForCausalLM")
    assert engine_arguments(context)["speculative_algorithm"] == "EAGLE3"
    assert {"llama", "qwen2", "qwen3", "minimax_m2"} <= set(RECORDED["counted_from_one"])


def test_the_hook_reads_what_the_wheel_hands_over() -> None:
    assert RECORDED["logits_processor"][1:6] == [
        "input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states"
    ]  # fmt: skip
    read = {"forward_mode", "rids", "extend_prefix_lens_cpu", "extend_seq_lens_cpu"}
    assert read <= set(RECORDED["forward_batch"])
    assert RECORDED["final_norm"][:2] == ["hidden_states", "residual"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tp_size": 2}, r"holds tp_size, which is set for you\n.*inference.sglang.tp_size"),
        ({"forward_hooks": []}, r"holds forward_hooks, which is set for you\n.*remove it"),
        ({"quantisation": "fp8"}, r"does not know; did you mean quantization\?"),
    ],
)
def test_arguments_that_are_refused(context: EngineContext, extra, message: str) -> None:
    settings = context.config.inference.sglang.model_copy(update={"extra_args": extra})
    with pytest.raises(ConfigError, match=message):
        sglang.check_extra_args(settings, RECORDED["server_args"])


def test_another_version_is_refused(context: EngineContext) -> None:
    known = set(RECORDED["server_args"]) - {"enable_return_aux_hidden_states"}
    with pytest.raises(ConfigError, match=r"does not know enable_return_aux.*\n.*0\.5\.23"):
        sglang.check_extra_args(context.config.inference.sglang, known)


# ---- the hook ---------------------------------------------------------------------------------


class FusedNorm(nn.Module):
    """As SGLang's: adds in place, and returns the sum beside the normed states."""

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return states / 2
        residual += states
        states.copy_(residual / 2)
        return states, residual


class Logits(nn.Module):
    def forward(self, input_ids, states, lm_head, batch, aux=None) -> None:
        return None


class Target:
    """Calls its norm and its logits processor as SGLang's models do; states tell of the token."""

    def __init__(self, hook: CaptureHook, *, packed: bool, residual: bool) -> None:
        self._norm, self._logits = FusedNorm(), Logits()
        self._packed, self._residual = packed, residual
        for module in (self._norm, self._logits):
            module.register_forward_hook(hook)

    def run(self, mode: str, pieces: list[tuple[str, np.ndarray, int, int]]) -> None:
        """One pass over rows ``[start, end)`` of some prompts: id, token ids, start, end."""
        ids = torch.cat([torch.tensor(ids[start:end]) for _, ids, start, end in pieces])
        *aux, last = (states_of(ids)[:, layer] for layer in range(4))
        half = last / 2
        normed = self._norm(half, half.clone()) if self._residual else self._norm(last)
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: mode == "extend"),
            rids=[rid for rid, *_ in pieces],
            extend_prefix_lens_cpu=[start for *_, start, _ in pieces],
            extend_seq_lens_cpu=[end - start for *_, start, end in pieces],
        )
        captured = torch.cat(aux, dim=1) if self._packed else aux
        self._logits(ids, normed, None, batch, captured)


def states_of(ids: Tensor) -> Tensor:
    """[T, 4, H] of token ids [T]."""
    layers = torch.arange(1, 5)[:, None] * torch.ones(HIDDEN)
    return ids[:, None, None] * layers


@pytest.fixture
def hook(run: RunDir) -> Iterator[CaptureHook]:
    made = capture_hook({"run_dir": str(run.root), "rank": 5, "columns": [0, 1, 2, 3]})
    assert made is not None
    yield made
    made._delivery.close()


@pytest.mark.parametrize(
    ("packed", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_rows_of_chunked_prompts_are_delivered_once(
    hook: CaptureHook, requester: Requester, packed: bool, residual: bool
) -> None:
    target = Target(hook, packed=packed, residual=residual)
    first, second, third = random_prompts([20, 7, 30])
    requests = {len(ids): requester.request(ids) for ids in (first, second, third)}

    def piece(ids: np.ndarray, start: int, end: int) -> tuple[str, np.ndarray, int, int]:
        destination = Destination.of(requests[len(ids)])
        return request_id(destination, len(ids)), ids, start, end

    target.run("extend", [piece(first, 0, 20), piece(second, 0, 3)])
    target.run("decode", [piece(first, 19, 20)])
    target.run("extend", [piece(second, 3, 7), ("HEALTH_CHECK", second, 0, 2), piece(third, 0, 9)])
    target.run("extend", [piece(third, 0, 12)])  # begun again: the first part is forgotten
    target.run("extend", [piece(third, 12, 30)])
    replies: dict[str, Receipt] = {}
    for _ in range(3):
        reply = requester.control.pop_reply(requester.rank, 60)
        assert isinstance(reply, Receipt)
        replies[reply.ticket] = reply
    assert requester.control.pop_reply(requester.rank, 0.2) is None
    for ids in (first, second, third):
        receipt = replies[requests[len(ids)].ticket]
        assert receipt.shape == (len(ids), 4, HIDDEN)
        expected = states_of(torch.tensor(ids)).float()
        assert torch.equal(requester.fetch(receipt.key, receipt.shape), expected)
    assert not hook._parts


def test_a_norm_that_is_not_where_it_is_looked_for(hook: CaptureHook) -> None:
    target = Target(hook, packed=True, residual=True)
    hook._last = None
    with pytest.raises(RuntimeError, match="the hook on the final norm did not"):
        target._logits(None, None, None, SimpleNamespace(forward_mode=Extend()), None)


class Extend:
    def is_extend(self) -> bool:
        return True


# ---- the engine, on a stand-in with the signatures of the wheel ---------------------------------


class StandIn:
    """``sglang.Engine``: answers after a moment, refuses what begins with token 7."""

    def __init__(self, **arguments: Any) -> None:
        assert arguments.keys() <= set(RECORDED["server_args"])
        self.loop = asyncio.new_event_loop()
        self.asked: list[dict[str, Any]] = []

    async def async_generate(self, **arguments: Any) -> dict[str, Any]:
        assert arguments.keys() <= set(RECORDED["async_generate"])
        self.asked.append(arguments)
        await asyncio.sleep(0.01 * len(arguments["input_ids"]))
        if arguments["input_ids"][0] == 7:
            raise ValueError("it begins with 7")
        return {}

    def shutdown(self) -> None:
        self.loop.close()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in RECORDED["server_args"]
    ]
    package, server_args = ModuleType("sglang"), ModuleType("sglang.srt.server_args")
    package.Engine, package.__version__ = StandIn, RECORDED["version"]
    signature = inspect.Signature(parameters)
    server_args.ServerArgs = type("ServerArgs", (), {"__signature__": signature})
    monkeypatch.setitem(sys.modules, "sglang", package)
    monkeypatch.setitem(sys.modules, "sglang.srt", ModuleType("sglang.srt"))
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", server_args)


def test_requests_are_admitted_while_others_run(
    stand_in: None, context: EngineContext, requester: Requester
) -> None:
    engine = SglangEngine(context)
    assert engine.max_prompts == 16
    long, short, bad = random_prompts([60, 2, 5])
    bad[0] = 7
    requests = [requester.request(ids) for ids in (long, short, bad)]
    engine.admit(requests[0])
    engine.admit(requests[1])
    assert [end.request for end in engine.step()] == [requests[1]]
    engine.admit(requests[2])
    (refused,) = engine.step()
    assert refused.request == requests[2]
    assert refused.problem == "SGLang refuses the prompt: it begins with 7"
    (end,) = engine.step()
    assert end.request == requests[0]
    assert end.problem is None
    asked = engine._engine.asked[0]
    assert asked["input_ids"] == long.tolist()
    assert asked["rid"] == request_id(Destination.of(requests[0]), 60)
    with pytest.raises(PromptRefused, match="201 tokens"):
        engine.admit(requester.request(random_prompts([201])[0]))
    engine.close()
