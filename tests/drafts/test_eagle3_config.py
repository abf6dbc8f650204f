"""The draft's shape: from the target, from a file, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 5e5,
}


def make(size: int = 100, /, *, target: Any = None, **overrides: Any) -> Eagle3Config:
    spec = TargetSpec.from_dict("target", TARGET | (target or {}))
    return Eagle3Config.from_target(spec, (2, 4, 5), size, overrides)


def test_takes_the_shape_of_the_target() -> None:
    assert make() == Eagle3Config(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        draft_vocab_size=100,
        aux_layers=(2, 4, 5),
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


def test_survives_json() -> None:
    config = make()
    assert Eagle3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_hugging_face_draft_configuration_may_change_the_shape() -> None:
    config = make(
        architectures=["LlamaForCausalLMEagle3"],
        model_type="llama",
        hidden_size=64,
        vocab_size=512,
        draft_vocab_size=100,
        num_hidden_layers=1,
        hidden_act="silu",
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        intermediate_size=256,
        num_attention_heads=8,
        head_dim=32,
        rope_theta=1e4,
        rope_scaling=None,
    )
    assert (config.intermediate_size, config.num_attention_heads, config.head_dim) == (256, 8, 32)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert config.num_key_value_heads == 2  # the target's


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
    ],
)
def test_rope_of_a_draft_configuration(overrides: Any, expected: Any) -> None:
    """As transformers would read that file; the target's if the file says nothing."""
    assert make(**overrides).rope_parameters == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"intermediate_sise": 1}, "unknown key intermediate_sise.*did you mean intermediate_size"),
        ({"hidden_size": 32}, "hidden_size = 32.*allowed: 64"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2.*allowed: 1"),
        ({"draft_vocab_size": 32000}, "32000.*allowed: 100.*set model.draft_vocab_size"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_attention_heads": 3}, "3 is no multiple of num_key_value_heads = 2"),
        ({"head_dim": 15}, "head_dim = 15 is odd"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 is no positive integer"),
        ({"intermediate_size": "big"}, "intermediate_size = 'big' is no positive integer"),
        ({"rope_scaling": {"rope_type": "spiral"}, "rope_theta": 1e4}, "spiral.*allowed:.*yarn"),
    ],
)
def test_impossible_overrides(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make(**overrides)


def test_draft_vocabulary_larger_than_the_target_s() -> None:
    with pytest.raises(ConfigError, match=r"(?s)model\.draft_vocab_size = 513.*1 to 512"):
        make(513)


@pytest.mark.parametrize(
    "rope",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ],
)
def test_a_rotary_kind_that_a_llama_draft_lacks_needs_parameters_of_its_own(rope: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)rope_parameters.*model.draft_model_config"):
        make(target=rope)
    own = {"rope_type": "default", "rope_theta": 1e4}
    assert make(target=rope, rope_parameters=own).rope_parameters == own
