"""Engines by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.inference.conftest import context_of, make_run
from tests.services import local_endpoints
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import EngineContext
from torchspec_hpc.inference.engines.registry import create_engine


@pytest.fixture
def context(tmp_path: Path, tiny_target: Path) -> object:
    def build(engine: str, device: str = "cpu") -> EngineContext:
        endpoints = local_endpoints("127.0.0.1:1", "127.0.0.1:2")
        return context_of(
            make_run(
                tmp_path / "run",
                tiny_target,
                endpoints,
                inference={"engine": engine, "device": device},
            )
        )

    return build


def test_an_engine_that_cannot_work_yet(context) -> None:
    with pytest.raises(
        ConfigError, match=r"is tokenspeed, .*hands no hidden states out.*\n  allowed: vllm, hf, sg"
    ):
        create_engine(context("tokenspeed"))


@pytest.mark.parametrize(
    ("name", "extras"), [("vllm", r"\[vllm\].*\[cpu\]"), ("sglang", r"\[sglang\]")]
)
def test_an_engine_that_is_not_installed(
    context, monkeypatch: pytest.MonkeyPatch, name: str, extras: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(ConfigError, match=rf"the package {name} is not installed\n.*{extras}"):
        create_engine(context(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["hf", "vllm"])
def test_a_gpu_that_is_not_there(context, name: str) -> None:
    with pytest.raises(ConfigError, match=r"inference\.device is cuda and torch finds no GPU"):
        create_engine(context(name, device="cuda"))
