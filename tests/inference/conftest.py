"""A run directory with real services, and a stand-in for a trainer that asks for states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.services import SECRET, control_server, local_endpoints, mooncake_master
from torchspec_hpc.config import Config, RunDir, parse_config, save_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.inference.engines.base import Engine, EngineContext
from torchspec_hpc.inference.placement import place
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import Receipt, Refusal, Request, encode_tokens
from torchspec_hpc.transfer.store import HiddenStateStore

AUX_LAYERS = (1, 2, 3)


@pytest.fixture(scope="package", autouse=True)
def _environment() -> Iterator[None]:
    """Takes back what an engine sets in this process's environment for vLLM."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def services() -> Iterator[Endpoints]:
    """A Mooncake master and a control store, shared by the tests of this package."""
    with mooncake_master() as master, control_server() as control:
        yield local_endpoints(control.endpoint, master.endpoint)


def tiny_config(run: Path, target: Path, **sections: dict[str, Any]) -> Config:
    """Settings for the tiny target on this machine's CPU; `sections` extend or replace them."""
    raw: dict[str, Any] = {
        "output_dir": str(run.parent),
        "model": {"target_model_path": str(target)},
        "dataset": {"train_data_path": "unused.jsonl"},
        "training": {"max_seq_length": 200},
        "inference": {
            "engine": "hf",
            "device": "cpu",
            "aux_hidden_states_layers": list(AUX_LAYERS),
            "num_threads": 1,
        },
        "mooncake": {"put_deadline_s": 2, "local_buffer_size": "32MiB"},
        "control": {"heartbeat_s": 0.2, "service_ready_s": 20},
    }
    for name, values in sections.items():
        raw[name] = raw[name] | values
    return parse_config(raw, base_dir=run, source="test")


def make_run(root: Path, target: Path, endpoints: Endpoints, **sections: dict[str, Any]) -> RunDir:
    """A run directory as a worker finds it."""
    run = RunDir(root)
    run.create()
    save_config(tiny_config(root, target, **sections), run.config)
    write_atomic(run.secret, SECRET.hex(), mode=0o600)
    replace(endpoints, run_id=f"{root.name}-00000000").write(run)
    return run


def context_of(run: RunDir) -> EngineContext:
    """What an engine of this run is built from."""
    from torchspec_hpc.config import load_config

    config = load_config(run.config)
    spec = TargetSpec.from_path(config.model.target_model_path)
    return EngineContext(
        config, run, Endpoints.read(run, 1), spec, 5, place(config.inference, 0, 1)
    )


@dataclass
class Requester:
    """What a trainer is to an engine: the owner of a memory segment, who is sent receipts."""

    store: HiddenStateStore
    control: ControlClient
    rank: int = 7
    asked: int = 0

    def request(self, token_ids: np.ndarray, key: str | None = None) -> Request:
        """A request whose states go to this requester, under a new key."""
        self.asked += 1
        ticket = f"requester/{id(self)}/{self.asked}"
        return Request(
            ticket=ticket,
            attempt_no=0,
            reply_to=self.rank,
            segment=self.store.segment,
            key=ticket if key is None else key,
            token_ids=encode_tokens(token_ids),
        )

    def run(self, engine: Engine, requests: list[Request]) -> list[Receipt | Refusal]:
        """Has an engine serve requests, all admitted at once; replies in their order."""
        for request in requests:
            engine.admit(request)
        finished = []
        while len(finished) < len(requests):
            finished += engine.step()
        assert {end.request.ticket for end in finished} == {r.ticket for r in requests}
        replies = {}
        while len(replies) < len(requests):
            reply = self.control.pop_reply(self.rank, 60)
            assert reply is not None
            replies[reply.ticket] = reply
        return [replies[request.ticket] for request in requests]

    def fetch(self, key: str, shape: tuple[int, int, int]) -> torch.Tensor:
        """Takes float32 states out of the store."""
        buffer = torch.full(shape, torch.nan)
        self.store.get_into(key, buffer)
        self.store.remove(key)
        return buffer


@pytest.fixture(scope="session")
def requester(
    services: Endpoints, tmp_path_factory: pytest.TempPathFactory, tiny_target: Path
) -> Iterator[Requester]:
    """A segment of 64 MiB."""
    config = tiny_config(tmp_path_factory.mktemp("requester"), tiny_target)
    store = HiddenStateStore.open(config.mooncake, services, segment_bytes=64 << 20, deadline_s=20)
    control = ControlClient(services.control, SECRET, timeout_s=10)
    yield Requester(store, control)
    control.close()
    store.close()


@pytest.fixture(scope="session")
def reference(tiny_target: Path) -> Reference:
    """The target in Transformers, one prompt at a time."""
    return Reference(tiny_target)


class Reference:
    """Hidden states by Transformers' own means, independent of our hooks."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def continues(self, token_ids: np.ndarray, num_tokens: int) -> list[int]:
        """The greedy answer."""
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        whole = self.model.generate(ids, do_sample=False, max_new_tokens=num_tokens)
        return whole[0, token_ids.size :].tolist()

    @torch.inference_mode()
    def check(self, token_ids: np.ndarray, states: torch.Tensor, tolerance: float = 2e-5) -> None:
        """Compares ``states [T, A + 1, H]`` with Transformers' hidden states."""
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        hidden = self.model.model(input_ids=ids, output_hidden_states=True).hidden_states
        assert states.shape == (token_ids.size, len(AUX_LAYERS) + 1, hidden[0].shape[-1])
        for column, layer in enumerate(AUX_LAYERS):
            assert relative_error(states[:, column], hidden[layer][0]) < tolerance
        # Transformers' last entry is after the final norm, ours before it
        assert relative_error(self.model.model.norm(states[:, -1]), hidden[-1][0]) < tolerance


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; NaN counts as infinite."""
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return float("inf") if np.isnan(error) else error


def random_prompts(lengths: list[int], seed: int = 0, vocab_size: int = 512) -> list[np.ndarray]:
    """Random token ids, one array for each length."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]
