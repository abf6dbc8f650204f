from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.templates import byte_tokenizer
from tests.helpers import CHATML
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path | str, template: Path | None = None) -> object:
    return load_tokenizer(
        ModelConfig(target_model_path=str(folder)), None if template is None else str(template)
    )


def test_its_own_template(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokenizer.chat_template == CHATML  # type: ignore[attr-defined]
    assert tokenizer.is_fast  # type: ignore[attr-defined]


def test_a_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    assert load(folder, template).chat_template == "{{ messages }}"  # type: ignore[attr-defined]


def test_no_template(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template(.|\n)*set dataset.chat_template"):
        load(folder)
    template = tmp_path / "t.jinja"
    template.write_text(CHATML)
    assert load(folder, template).chat_template == CHATML  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b"\xff", "cannot read"), (b" \n", "is empty")]
)
def test_an_unusable_template_file(
    folder: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    template = tmp_path / "t.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(ConfigError, match=f"dataset.chat_template: .*{message}"):
        load(folder, template)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no directory {tmp_path}/none"):
        load(tmp_path / "none")


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a directory with tokenizer.json, or a hub id"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["garbage", "{}", '{"version": "1.0", "added_tokens": []}'])
def test_a_broken_tokenizer_file(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=f"cannot load a tokenizer from {folder}: "):
        load(folder)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="cannot load a tokenizer from no-such-org/no-such-model"):
        load("no-such-org/no-such-model")


def test_a_slow_tokenizer(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"ByT5Tokenizer.*has no character offsets"):
        load(tmp_path)


def test_importing_the_data_layer_does_not_import_torch() -> None:
    code = (
        "import sys, torchspec_hpc.data.dataset, torchspec_hpc.data.vocab; 'torch' in sys.modules"
    )
    code = code.replace("; 'torch'", "; sys.exit('torch'") + ")"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
