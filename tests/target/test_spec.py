"""Reading config.json of a target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(folder: Path, **changes: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    values = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def with_layers(num_layers: int) -> TargetSpec:
    return TargetSpec.from_dict("target", CONFIG | {"num_hidden_layers": num_layers})


def test_reads_every_field(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert TargetSpec.from_path(path) == TargetSpec(
        path=path,
        architecture="LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000},
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_reads_a_nested_text_config(tmp_path: Path) -> None:
    inner = {k: v for k, v in CONFIG.items() if k not in ("architectures", "tie_word_embeddings")}
    inner |= {"eos_token_id": [2, 7], "dtype": "float16", "head_dim": 128}
    outer = {
        "architectures": ["SomeVisionModel"],
        "text_config": inner,
        "tie_word_embeddings": True,
        "hidden_size": 1,
    }
    spec = TargetSpec.from_dict("target", outer)
    assert spec.architecture == "SomeVisionModel"
    assert (spec.hidden_size, spec.head_dim, spec.dtype) == (576, 128, "float16")
    assert spec.tie_word_embeddings
    assert spec.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": "absent"}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000},
        ),
        (
            {"rope_theta": "absent", "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}},
            {"rope_type": "yarn", "rope_theta": 5e5},
        ),
    ],
)
def test_both_rope_spellings(tmp_path: Path, changes: Any, expected: Any) -> None:
    assert TargetSpec.from_path(write(tmp_path, **changes)).rope_parameters == expected


def test_reads_what_transformers_writes(tiny_target: Path) -> None:
    spec = TargetSpec.from_path(str(tiny_target))
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (4, 64, 512)
    assert (spec.head_dim, spec.num_key_value_heads, spec.dtype) == (32, 1, "float32")
    assert spec.rope_parameters["rope_theta"] == 10000.0
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize("num_layers", [8, 30, 32, 80])
def test_default_aux_layers(num_layers: int) -> None:
    spec = with_layers(num_layers)
    assert spec.aux_layers(None) == (2, num_layers // 2, num_layers - 3)


def test_configured_aux_layers() -> None:
    assert with_layers(4).aux_layers((1, 2, 3)) == (1, 2, 3)
    assert with_layers(4).aux_layers((4,)) == (4,)


@pytest.mark.parametrize(
    ("num_layers", "configured", "fix"),
    [
        (1, None, "[1]"),
        (2, None, "[1]"),
        (3, None, "[1, 2, 3]"),
        (4, None, "[1, 2, 3]"),
        (5, None, "[1, 3, 4]"),
        (30, (2, 2, 27), "[10, 19, 29]"),
        (30, (27, 2), "[10, 19, 29]"),
        (30, (0, 5), "[10, 19, 29]"),
        (30, (5, 31), "[10, 19, 29]"),
        (30, (), "[10, 19, 29]"),
    ],
)
def test_aux_layers_that_do_not_fit(num_layers: int, configured: Any, fix: str) -> None:
    spec = with_layers(num_layers)
    with pytest.raises(ConfigError) as error:
        spec.aux_layers(configured)
    message = str(error.value)
    assert "inference.aux_hidden_states_layers" in message
    assert f"from 1 to {num_layers}" in message
    assert message.endswith(f"for instance to {fix}")
    suggestion = tuple(json.loads(fix))
    assert spec.aux_layers(suggestion) == suggestion  # the advice works


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)nowhere: no such directory.*hub id.*next:"):
        TargetSpec.from_path(str(tmp_path / "nowhere"))


def test_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"(?s)no-org/no-model.*hub.*hf download no-org/no-model"):
        TargetSpec.from_path("no-org/no-model")
    with pytest.raises(ConfigError, match=r"not//an//id"):
        TargetSpec.from_path("not//an//id")


def test_hub_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    revision = "0" * 40
    repo = tmp_path / "models--org--name"
    write(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert TargetSpec.from_path("org/name").hidden_size == 576


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": "absent"}, "no rms_norm_eps"),
        ({"hidden_size": "absent"}, "no hidden_size"),
        ({"vocab_size": "many"}, "vocab_size = 'many' is no positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    ],
)
def test_unusable_configurations(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TargetSpec.from_path(write(tmp_path, **changes))


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_unreadable_file(tmp_path: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json"):
        TargetSpec.from_path(str(tmp_path))


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        TargetSpec.from_path(str(tmp_path))


def test_reads_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from torchspec_hpc.target.spec import TargetSpec\n"
        f"TargetSpec.from_path({write(tmp_path)!r}).aux_layers(None)\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
