"""The gates that only a real engine gives: vLLM loads what we write and computes what we train.

Both engines of this module run in one process, once: see :mod:`tests.export.serve_gates`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.export.conftest import RunWriter
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.config.yaml_io import dump_yaml
from torchspec_hpc.drafts.batch import pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.formats import Served
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.eagle3.plan import make_plan
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, draft_config, export_draft
from torchspec_hpc.export.evaluate import Case, ServeSettings
from torchspec_hpc.export.follow import FollowSettings, follow
from torchspec_hpc.export.prompts import Prompt, PromptSet
from torchspec_hpc.export.pruning import prune
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import load_target_tensors

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
K, ANSWER = 3, 40
PROMPT = [{"role": "user", "content": "What is red and blue, number 3?"}]
AUX = (1, 2, 3)


class Answer(NamedTuple):
    """A prompt and its greedy answer.

    Attributes:
        tokens: [T] of both.
        num_prompt: Tokens of the prompt.
        states: [T, A+1, H].
    """

    tokens: torch.Tensor
    num_prompt: int
    states: torch.Tensor


@dataclass
class Gate:
    """One memorised answer, served with a draft in each format.

    Attributes:
        answer: What was memorised.
        full: The draft with the whole vocabulary, served from the hf format.
        pruned: With half of it, served from the speculators format.
        served: What vLLM did, by format.
    """

    answer: Answer
    full: DraftCheckpoint
    pruned: DraftCheckpoint
    served: dict[str, Any]


@pytest.fixture(scope="module")
def gate(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Gate:
    folder = tmp_path_factory.mktemp("gates")
    answer = _greedy_answer(tiny_target)
    full = _overfit(tiny_target, answer)
    others = torch.tensor([i for i in range(512) if i not in set(answer.tokens.tolist())])
    pruned = prune(full, torch.cat([answer.tokens.unique(), others])[:256].sort().values.numpy())
    how = Served(str(tiny_target), "LlamaForCausalLM", K)
    hf = export_draft(full, folder / "hf", ExportOptions(how, "hf", "float32"))
    other = export_draft(pruned, folder / "other", ExportOptions(how, "speculators", "float32"))
    job = {
        "settings": asdict(ServeSettings(str(tiny_target), max_model_len=256)),
        "engines": [
            {"target": str(tiny_target), "draft": str(hf), "k": K},
            {"target": str(other), "draft": None, "k": K},  # names target, method and k itself
        ],
        "cases": [
            case([{"messages": PROMPT, "followups": []}], ANSWER, 1),
            case([{"messages": PROMPT, "followups": ["And blue?"]}] * 3, 8, 2),
            case([{"messages": PROMPT, "followups": []}] * 2, 8, 2) | {"temperature": 1.0},
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.export.serve_gates", "job.json", "reply.pt"]
    command[-2:] = [str(folder / name) for name in command[-2:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    replies = torch.load(folder / "reply.pt", weights_only=True)
    return Gate(answer, full, pruned, dict(zip(("hf", "speculators"), replies, strict=True)))


def case(prompts: list[dict[str, Any]], max_tokens: int, concurrency: int) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "concurrency": concurrency,
    }


@pytest.mark.parametrize("draft_format", ["hf", "speculators"])
def test_a_memorised_answer_is_accepted_whole(gate: Gate, draft_format: str) -> None:
    """Also where the vocabulary was cut to half after training: the answer is inside it."""
    run = gate.served[draft_format]["runs"][0]
    [conversation] = run["conversations"]
    expected = gate.answer.tokens[gate.answer.num_prompt :].tolist()
    assert conversation["answers"] == [expected], "drafting changed the answer"
    # the end of the answer cuts the last draft short
    assert run["num_accepted_by_position"][0] / run["num_drafts"] > 0.9
    assert run["num_accepted"] / run["num_drafts"] > 0.9 * K


def test_what_was_accepted_is_known_by_conversation(gate: Gate) -> None:
    run = gate.served["hf"]["runs"][0]
    [conversation] = run["conversations"]
    assert conversation["num_drafts"] == run["num_drafts"]
    assert conversation["num_accepted"] == run["num_accepted"]


@pytest.mark.parametrize("draft_format", ["hf", "speculators"])
def test_conversations_of_several_turns(gate: Gate, draft_format: str) -> None:
    run = gate.served[draft_format]["runs"][1]
    assert len(run["conversations"]) == 3
    for conversation in run["conversations"]:
        assert [len(turn) for turn in conversation["answers"]] == [8, 8]
        assert len(conversation["latencies_s"]) == len(conversation["first_token_s"]) == 2
        assert conversation["latencies_s"][0] > conversation["first_token_s"][0] > 0


def test_sampled_answers(gate: Gate) -> None:
    runs = [gate.served[name]["runs"][2] for name in ("hf", "speculators")]
    first, second = (c["answers"][0] for c in runs[0]["conversations"])
    assert len(first) == len(second) == 8
    assert first != second, "each has a seed of its own"
    assert all(run["num_drafts"] > 0 for run in runs)


@pytest.mark.parametrize("draft_format", ["hf", "speculators"])
def test_vllm_computes_the_logits_that_we_train(gate: Gate, draft_format: str) -> None:
    """The first draft after the prompt: k steps of vLLM against our unrolled training step."""
    checkpoint = gate.full if draft_format == "hf" else gate.pruned
    served = gate.served[draft_format]
    config, length = draft_config(checkpoint), gate.answer.num_prompt
    kept = None if checkpoint.kept_ids is None else torch.from_numpy(checkpoint.kept_ids)
    embedding = _target_tensors(checkpoint.meta.target).embedding
    draft = Eagle3Draft(config, embedding, kept)
    draft.load_state_dict(dict(checkpoint.tensors))

    drafted = served["logits"].argmax(-1)[: K - 1]
    tokens = torch.cat([gate.answer.tokens[: length + 1], drafted, torch.zeros(1, dtype=int)])
    assert served["states"].shape == (length, len(AUX) * config.hidden_size)
    states = torch.zeros(len(tokens), len(AUX) + 1, config.hidden_size)
    states[:length, :-1] = served["states"].view(length, len(AUX), -1)
    # supervise the token that step K - 1 predicts from the last position of the prompt
    batch = pack([(tokens, torch.arange(len(tokens)) == length + K, states)])
    plan = make_plan(batch, K)
    with torch.no_grad():
        rows = [
            hidden[step.index == length - 1]
            for hidden, step in zip(draft._unroll(batch, plan), plan.steps, strict=True)
        ]
        ours = draft.lm_head(draft.norm(torch.cat(rows)))
    assert ours.shape[0] == K
    theirs = served["logits"] if kept is None else served["logits"][:, kept]
    assert ours.std() > 1, "logits that say something"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)


def test_a_run_is_followed_until_it_is_done(gate: Gate, write_run: RunWriter) -> None:
    """Through the engine's own process, as the command does it."""
    meta = replace(gate.full.meta, step=7)
    run = RunDir(write_run(replace(gate.full, meta=meta)))
    run.control.mkdir()
    config = {
        "run_name": "run",
        "output_dir": str(run.root.parent),
        "model": {"target_model_path": meta.target},
        "dataset": {"train_data_path": "data.jsonl"},
    }
    run.config.write_text(dump_yaml(config))
    run.done.touch()
    prompts = PromptSet("mine", (Prompt(tuple(PROMPT)),))
    serve = ServeSettings(meta.target, max_tokens=ANSWER, max_model_len=256)
    settings = FollowSettings(serve, [Case(prompts)], K, poll_s=0.1)
    follow(run, settings)
    follow(run, settings)  # nothing is left to measure
    [record] = [json.loads(line) for line in (run.root / "served.jsonl").read_text().splitlines()]
    assert (record["step"], record["prompts"]) == (7, "mine")
    assert record["accept_len"] > 0.9 * (1 + K)
    low, high = record["accept_len_interval"]
    assert low == high == pytest.approx(record["accept_len"]), "one conversation has no spread"
    events = EventAccumulator(str(run.tensorboard / "served"))
    events.Reload()
    [scalar] = events.Scalars("served_accept_len/mine, temperature 0, 8 in flight")
    assert (scalar.step, scalar.value) == (7, pytest.approx(record["accept_len"]))


def _target_tensors(target: str) -> Any:
    spec = TargetSpec.from_path(target)
    return load_target_tensors(ModelConfig(target_model_path=target), spec, torch.float32)


def _greedy_answer(target: Path) -> Answer:
    """What the target says to the prompt, as transformers computes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    last = []
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=ANSWER, do_sample=False)
        hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        hidden = model.model(tokens, output_hidden_states=True).hidden_states
        hook.remove()
    states = torch.stack([*(hidden[layer][0] for layer in AUX), last[0][0]], dim=1)
    return Answer(tokens[0], length, states)


def _overfit(target: Path, answer: Answer) -> DraftCheckpoint:
    """Trains a draft with the whole vocabulary until it knows the answer by heart."""
    tokens, num_prompt, states = answer
    spec = TargetSpec.from_path(str(target))
    tensors = load_target_tensors(ModelConfig(target_model_path=str(target)), spec, torch.float32)
    config = Eagle3Config.from_target(spec, AUX, spec.vocab_size)
    draft = Eagle3Draft(config, tensors.embedding)
    draft.initialize(tensors, 0)
    # colder than the target: the same choices, and no ties between them to learn
    head = TargetHead(tensors.norm, 5 * tensors.lm_head, spec.rms_norm_eps)
    mask = torch.arange(len(tokens)) >= num_prompt
    batch = pack([(tokens, mask, states)])
    plan = make_plan(batch, K)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    for _ in range(400):
        output = draft(batch, head, plan, plan.trained, torch.full((K,), 1.0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if torch.equal(output.correct, plan.scored):
            break
    assert torch.equal(output.correct, plan.scored), "the draft did not learn the answer"
    weights = {name: p.detach() for name, p in draft.named_parameters()}
    draft_meta = {"config": config.to_dict(), "kept_ids_file": None}
    meta = CheckpointMeta(1, 1, draft_meta, target=str(target), stream={}, world_size=1)
    return DraftCheckpoint(Path(), meta, weights, None)
