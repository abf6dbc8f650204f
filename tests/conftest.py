"""Fixtures for every test: a tiny target model and a few conversations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# tiny models gain nothing from a second thread, and lose much where tests share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# programs of the environment that runs the tests (shellcheck), also where it is not activated
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from tests.helpers import CHATML, conversations, write_jsonl


@pytest.fixture(scope="session")
def tiny_conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 64 short conversations in OpenAI form."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "conversations.jsonl", conversations(64))


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, hidden size 64, vocabulary 512, with a ChatML tokenizer."""
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny-llama")


def make_tiny_target(folder: Path, **overrides: object) -> Path:
    """Builds the tiny target; `overrides` change its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **overrides,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():  # larger weights than the default: a random model that has preferences
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(40.0 if name == "lm_head.weight" else 4.0)
    model.save_pretrained(folder)
    return folder


def make_tiny_tokenizer(folder: Path) -> Path:
    """Trains a BPE tokenizer of at most 512 entries on the conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [turn["content"] for row in conversations(64) for turn in row["messages"]]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "system user assistant\nYou help."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHATML
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder
