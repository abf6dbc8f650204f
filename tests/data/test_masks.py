from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from tests.data import templates
from tests.data.templates import byte_tokenizer
from tests.helpers import CHATML
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.data.conversations import Conversation
from torchspec_hpc.data.masks import ChatEncoder
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import ConfigError, DataError

ANSWERS = ["Grüße, 世界!\n\n  2  spaces", "the answer 🙂"]
CHAT = [
    {"role": "user", "content": "Wie geht's — ça va?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And the text?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
THOUGHT = "<think>\nhm\n</think>\n\n"


def encoder_of(
    tokenizer: Any, last_turn_only: bool | Literal["auto"], **dataset: Any
) -> ChatEncoder:
    config = DatasetConfig(train_data_path="a.jsonl", last_turn_loss_only=last_turn_only, **dataset)
    return ChatEncoder(tokenizer, config)


def supervised(encoder: ChatEncoder, messages: list[dict[str, str]]) -> list[str]:
    """Runs of supervised tokens, decoded; the tokens must be those of the whole text."""
    rendered = encoder.render(Conversation(messages))
    [(ids, mask)] = encoder.tokenize([rendered])
    tokenizer: Any = encoder._tokenizer
    assert tokenizer.decode(ids.tolist()) == rendered.text
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.bool_, mask.shape)
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in edges]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (templates.BLOCKS, "<|im_end|>"),
        (templates.LLAMA3, "<|eot_id|>"),
        (templates.MISTRAL, "</s>"),
        (templates.STRIPS_THINKING, "<|im_end|>"),
    ],
)
def test_answers_and_ends_of_turn_are_supervised(
    template: str, end: str, trim_offsets: bool
) -> None:
    tokenizer = byte_tokenizer(template, trim_offsets=trim_offsets)
    space = " " if template == templates.MISTRAL else ""  # " the" is one token, and is generated
    answers = [space + text + end for text in ANSWERS]
    assert supervised(encoder_of(tokenizer, False), CHAT) == answers
    assert supervised(encoder_of(tokenizer, True), CHAT) == answers[1:]


def test_both_ways_give_the_same_tokens_and_mask() -> None:
    blocks, plain = (
        encoder_of(byte_tokenizer(template), False)
        for template in (templates.BLOCKS, templates.STRIPS_THINKING)
    )
    for a, b in zip(
        blocks.tokenize([blocks.render(Conversation(CHAT))])[0],
        plain.tokenize([plain.render(Conversation(CHAT))])[0],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("content", ["  padded answer\n", "the answer\n\n", " the"])
def test_white_space_around_an_answer(content: str) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    trimming = encoder_of(byte_tokenizer(templates.LLAMA3), False)
    assert supervised(trimming, chat) == [content.strip() + "<|eot_id|>"]
    keeping = encoder_of(byte_tokenizer(CHATML), False)
    assert supervised(keeping, chat) == [content + "<|im_end|>"]


def test_a_token_that_begins_in_the_prompt_is_not_supervised() -> None:
    r"""A header's "\n" and an answer's are one token here; no engine would generate that."""
    tokenizer = byte_tokenizer(CHATML)
    newlines = tokenizer.convert_tokens_to_ids("ĊĊ")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n\nthe"}]
    encoder = encoder_of(tokenizer, False)
    [(ids, mask)] = encoder.tokenize([encoder.render(Conversation(chat))])
    assert not mask[ids.tolist().index(newlines)]
    assert tokenizer.decode(ids[mask].tolist()) == "\nthe<|im_end|>"


@pytest.mark.parametrize(
    ("template", "last_turn_only"),
    [
        (CHATML, False),
        (templates.LLAMA3, False),
        (templates.BLOCKS, False),
        (templates.STRIPS_THINKING, True),
        (templates.EMPTY_THINKING, True),
    ],
)
def test_auto_takes_the_last_turn_where_history_is_changed(
    template: str, last_turn_only: bool
) -> None:
    assert encoder_of(byte_tokenizer(template), "auto").last_turn_only is last_turn_only


def test_thinking_taken_out_of_history() -> None:
    chat = [dict(message) for message in CHAT]
    for message in chat[1::2]:
        message["content"] = THOUGHT + message["content"]
    tokenizer = byte_tokenizer(templates.STRIPS_THINKING)
    everything = encoder_of(tokenizer, False)
    assert everything.render(Conversation(chat)).num_changed == 1
    assert supervised(everything, chat) == [THOUGHT + ANSWERS[1] + "<|im_end|>"]
    encoder = encoder_of(tokenizer, "auto")
    assert supervised(encoder, chat) == [THOUGHT + ANSWERS[1] + "<|im_end|>"]
    assert "hm" not in encoder.render(Conversation(chat)).text.split("And the text?")[0]


def test_what_the_template_adds_before_an_answer_is_not_supervised() -> None:
    encoder = encoder_of(byte_tokenizer(templates.EMPTY_THINKING), "auto")
    assert supervised(encoder, CHAT) == [ANSWERS[1] + "<|im_end|>"]
    everything = encoder_of(byte_tokenizer(templates.EMPTY_THINKING), False)
    assert everything.render(Conversation(CHAT)).num_changed == 1


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            CHATML,
            [CHAT[0], {"role": "assistant", "content": "a <|im_end|> b"}],
            r"text holds an end of turn: <\|im_end\|> in turn 2",
        ),
        (
            templates.MISTRAL,
            [{"role": "system", "content": "Be kind."}, *CHAT],
            "chat template refuses it: roles must alternate",
        ),
        (
            templates.EMPTY_THINKING,
            [CHAT[0], {"role": "assistant", "content": "<think>\nhm, and"}],
            "thinking is not closed",
        ),
        (
            templates.WHISPERS,
            [{"role": "user", "content": "psst!"}, CHAT[1]],
            "not rendered as generated",
        ),
    ],
)
def test_rows_that_cannot_be_masked(
    template: str, messages: list[dict[str, str]], reason: str
) -> None:
    encoder = encoder_of(byte_tokenizer(template), False)
    with pytest.raises(BadRow, match=reason):
        encoder.render(Conversation(messages))


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (
            templates.PROMPTS_THINKING.replace("<think>", "So: "),
            "the generation prompt .*So: .* do not follow each other",
        ),
        (templates.NO_TOKEN_AT_END, r"no end-of-turn token follows the answer, but ' \(over\)"),
        (CHATML.replace("message['content']", "message['text']"), "plain conversation: chat templ"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "do not follow each"),
        (
            templates.BLOCKS.replace("m['role'] == 'assistant' %}", "loop.last %}"),
            "generation blocks do not match: 1 for 2 assistant turns",
        ),
        (
            (
                "{% for m in messages %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
                "{% endfor %}"
            ),
            "it would supervise .*First question",
        ),
    ],
)
def test_templates_that_cannot_be_verified(template: str, found: str) -> None:
    with pytest.raises(DataError, match=found) as error:
        encoder_of(byte_tokenizer(template), "auto")
    assert "{% generation %}" in str(error.value)


def test_a_template_that_is_no_jinja() -> None:
    with pytest.raises(ConfigError, match=r"chat template, line 2: .*endfor"):
        encoder_of(byte_tokenizer("{% for m in messages %}\n{{ m }}{% endfoo %}"), False)


def test_a_space_without_width_before_the_answer() -> None:
    tokenizer = byte_tokenizer(templates.SPACE, trim_offsets=True)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nthe"}]
    assert supervised(encoder_of(tokenizer, False), chat) == ["\nthe</s>"]


@pytest.mark.parametrize("mode", [False, "auto"])
def test_blocks_may_be_cut_in_pieces(mode: Literal[False, "auto"]) -> None:
    """As where a template writes thinking, text and end of turn in one block each."""
    template = templates.BLOCKS.replace(
        "{{ m['content'] }}<|im_end|>\n{% endgeneration %}",
        "{% endgeneration %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% generation %}<|im_end|>{% endgeneration %}\n",
    )
    encoder = encoder_of(byte_tokenizer(template), mode)
    assert supervised(encoder, CHAT) == [text + "<|im_end|>" for text in ANSWERS]


def test_a_template_without_end_of_turn_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    template = CHATML.replace("message['content'] + '<|im_end|>\\n'", "message['content']")
    encoder = encoder_of(byte_tokenizer(template), False)
    assert supervised(encoder, CHAT) == ANSWERS
    assert "will not learn to stop" in caplog.text


def test_white_space_among_the_added_tokens_ends_no_turn() -> None:
    """Gemma's newlines are added tokens."""
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "\\n<|im_end|>"))
    tokenizer.add_tokens(["\n", "\n\n"])
    encoder = encoder_of(tokenizer, False)
    assert supervised(encoder, CHAT) == [text + "\n<|im_end|>" for text in ANSWERS]


def test_the_fingerprint_knows_template_tokenizer_and_mode() -> None:
    tokenizers = [byte_tokenizer(), byte_tokenizer(templates.LLAMA3), byte_tokenizer()]
    tokenizers[2].add_tokens(["<extra>"])
    prints = {encoder_of(tokenizer, False).fingerprint() for tokenizer in tokenizers}
    prints.add(encoder_of(byte_tokenizer(), True).fingerprint())
    assert len(prints) == 4
    assert encoder_of(byte_tokenizer(), "auto").fingerprint() in prints


def test_an_end_of_turn_outside_of_the_block_is_supervised() -> None:
    template = templates.BLOCKS.replace(
        "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
    )
    encoder = encoder_of(byte_tokenizer(template), False)
    assert supervised(encoder, CHAT) == [text + "<|im_end|>" for text in ANSWERS]
