"""The gate that only a real engine gives: a draft that memorised an answer has it all accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.drafts.batch import pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.formats import Served
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.eagle3.plan import make_plan, scored_targets
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft
from torchspec_hpc.export.evaluate import ServeSettings, measure
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import load_target_tensors

K, ANSWER, VOCABULARY = 3, 40, 200
PROMPT = [{"role": "user", "content": "What is red and blue, number 3?"}]
AUX = (1, 2, 3)


@pytest.mark.vllm
@pytest.mark.slow
def test_memorised_answer_is_accepted_whole(tiny_target: Path, tmp_path: Path) -> None:
    tokens, num_prompt, states = _greedy_answer(tiny_target)
    checkpoint = _overfit(tiny_target, tokens, num_prompt, states)
    served_as = Served(str(tiny_target), "LlamaForCausalLM", K)
    draft = export_draft(checkpoint, tmp_path / "draft", ExportOptions(served_as, dtype="float32"))
    settings = ServeSettings(
        str(tiny_target), num_speculative_tokens=K, max_tokens=ANSWER, max_model_len=256
    )
    log = tmp_path / "vllm.log"
    served = measure(settings, [PROMPT], name="memorised", draft=draft, log=log)
    assert list(served.outputs[0]) == tokens[num_prompt:].tolist(), "drafting changed the answer"
    # the end of the answer cuts the last draft short
    assert served.accept_by_position[0] > 0.9
    assert served.accept_len > 0.9 * (1 + K)


def _greedy_answer(target: Path) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Tokens of prompt and answer [T], length of the prompt, states [T, A+1, H]."""
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
    return tokens[0], length, states


def _overfit(
    target: Path, tokens: torch.Tensor, num_prompt: int, states: torch.Tensor
) -> DraftCheckpoint:
    """Trains a draft with a pruned vocabulary until it knows the answer by heart."""
    spec = TargetSpec.from_path(str(target))
    tensors = load_target_tensors(ModelConfig(target_model_path=str(target)), spec, torch.float32)
    others = torch.tensor([i for i in range(spec.vocab_size) if i not in set(tokens.tolist())])
    kept = torch.cat([tokens.unique(), others])[:VOCABULARY].sort().values
    config = Eagle3Config.from_target(spec, AUX, VOCABULARY)
    draft = Eagle3Draft(config, tensors.embedding, kept)
    draft.initialize(tensors, 0)
    # colder than the target: the same choices, and no ties between them to learn
    head = TargetHead(tensors.norm, 5 * tensors.lm_head, spec.rms_norm_eps)
    mask = torch.arange(len(tokens)) >= num_prompt
    batch = pack([(tokens, mask, states)])
    plan = make_plan(batch, K, draft.t2d[head.argmax(batch.last[scored_targets(batch)])])
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    for _ in range(400):
        output = draft(batch, head.rows(kept), plan, plan.trained, torch.full((K,), 1.0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if torch.equal(output.correct, plan.scored):
            break
    assert torch.equal(output.correct, plan.scored), "the draft did not learn the answer"
    weights = {name: p.detach() for name, p in draft.named_parameters()}
    draft_meta = {"config": config.to_dict()}
    meta = CheckpointMeta(1, 1, draft_meta, target=str(target), stream={}, world_size=1)
    return DraftCheckpoint(Path(), meta, weights, kept.numpy())
