"""The draft's training step against an independent one, and what training relies on."""

from __future__ import annotations

import pytest
import torch

from tests.drafts import naive_eagle3
from tests.drafts.cases import EPS, THETA, Case, Document, make_case, make_config
from torchspec_hpc.drafts.batch import pack
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.eagle3.ttt import accept_len
from torchspec_hpc.target.weights import TargetTensors


def decay(ttt_length: int) -> torch.Tensor:
    return 0.8 ** torch.arange(ttt_length, dtype=torch.float64)


def run_naive(case: Case, documents: list[Document], weights: torch.Tensor) -> naive_eagle3.Result:
    config = case.config
    return naive_eagle3.ttt(
        dict(case.draft.named_parameters()),
        {
            "eps": EPS,
            "theta": THETA,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        },
        case.tensors.embedding,
        case.tensors.norm,
        case.tensors.lm_head,
        case.kept,
        documents,
        weights.tolist(),
        None,
    )


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("ttt_length", [1, 3, 7])
@pytest.mark.parametrize("lengths", [(17,), (1, 2, 3, 9, 1, 13)], ids=["one", "packed"])
def test_matches_the_naive_form(pruned: bool, ttt_length: int, lengths: tuple[int, ...]) -> None:
    case = make_case(pruned=pruned)
    documents = [case.document(length) for length in lengths]
    weights = decay(ttt_length)

    output = case.run(documents, weights)
    output.loss.backward()
    gradients = case.gradients()
    expected = run_naive(case, documents, weights)
    expected.loss.backward()

    plan = case.plan(pack(documents), len(weights))
    assert plan.scored.tolist() == expected.scored
    assert plan.trained.tolist() == expected.trained
    assert output.correct.tolist() == expected.correct
    assert sum(expected.trained) > 0
    if pruned:
        assert sum(expected.trained) < sum(expected.scored), "the case does not test pruning"
    torch.testing.assert_close(output.loss_sums, torch.stack(expected.loss_sums).detach())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-10, atol=0)
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_documents_with_nothing_to_learn_change_nothing() -> None:
    case = make_case(pruned=True)
    documents = [case.document(length) for length in (5, 12)]
    idle = [case.document(length, supervised=0.0) for length in (1, 7)]
    case.run(documents, decay(3)).loss.backward()
    alone = case.gradients()
    case.run([idle[0], documents[0], idle[1], documents[1]], decay(3)).loss.backward()
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(gradient, alone[name], msg=name)


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (8, 5)])
def test_nothing_supervised_gives_zero_gradients_to_all(lengths: tuple[int, ...]) -> None:
    """FSDP reduces gradients collectively: a rank without any would leave the others waiting."""
    case = make_case(pruned=False)
    output = case.run([case.document(n, supervised=0.0) for n in lengths], decay(4))
    assert output.loss.item() == 0.0
    assert output.correct.sum() == 0
    assert accept_len(output.correct, torch.zeros(4)) == 1.0
    output.loss.backward()
    for name, gradient in case.gradients().items():  # asserts that it is there
        assert not gradient.any(), name


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_gradient_does_not_depend_on_the_cut_into_micro_batches(pruned: bool) -> None:
    case = make_case(pruned=pruned)
    a, b, c, d = (case.document(n, supervised=s) for n, s in ((9, 0.9), (3, 1), (14, 0.2), (2, 1)))
    cuts = [[[a, b, c, d]], [[a], [b], [c], [d]], [[d, a], [c, b]], [[c], [b, d, a]]]
    results = []
    for cut in cuts:
        counts = [case.plan(pack(part), 5).trained for part in cut]
        outputs = [case.run(part, decay(5), torch.stack(counts).sum(0)) for part in cut]
        loss = sum(output.loss for output in outputs)
        loss.backward()
        results.append((loss.item(), case.gradients()))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], msg=name)


def test_what_a_prediction_may_read() -> None:
    """Step i that predicts x_m reads the hidden states up to m-2-i and the tokens up to m-1."""
    case = make_case(pruned=False)
    length, m = 12, 8
    ids, mask, states = case.document(length)
    ids = torch.arange(length)  # all different: a row of the embedding is a position
    mask = torch.arange(length) == m
    batch = pack([case.document(5), (ids, mask, states), case.document(6)])
    batch.loss_mask[:5] = batch.loss_mask[-6:] = False
    batch.input_ids[:5] = batch.input_ids[-6:] = 39
    batch.aux.requires_grad_()
    case.draft.embedding.requires_grad_()
    for step in range(4):
        plan = case.plan(batch, 4)
        weights = torch.zeros(4, dtype=torch.float64)
        weights[step] = 1
        assert plan.trained.tolist() == [1, 1, 1, 1]
        case.draft(batch, case.head, plan, plan.trained, weights).loss.backward()
        read_states = batch.aux.grad.abs().sum(1).nonzero()[:, 0] - 5
        read_tokens = case.draft.embedding.grad.abs().sum(1).nonzero()[:, 0]
        assert read_states.tolist() == list(range(m - 2 - step + 1))
        assert read_tokens.tolist() == list(range(1, m))  # x_0 is only in the target's states
        batch.aux.grad = case.draft.embedding.grad = None


def test_computes_only_rows_that_a_later_step_trains() -> None:
    case = make_case(pruned=False)
    ids, mask, states = case.document(40)
    mask[:] = False
    mask[20:24] = True
    batch = pack([(ids, mask, states)])
    plan = case.plan(batch, 3)
    rows = [step.index[step.order].tolist() for step in plan.steps]
    # x_20..x_23 are predicted at 18..21, 17..20 and 16..19
    assert rows == [list(range(16, 22)), list(range(16, 21)), list(range(16, 20))]
    states = [len(state) for state in case.draft._unroll(batch, plan)]
    assert states == [len(step) for step in rows]
    assert plan.num_states == 15


def test_learns_one_sequence_by_heart() -> None:
    case = make_case(pruned=True, dtype=torch.float32)
    ids, _, states = case.document(12)
    mask, states = torch.ones(12, dtype=torch.bool), states.float()
    # the target's own choices are all in the draft's vocabulary
    choices = torch.tensor(case.kept)[torch.randint(0, 25, (12,), generator=case.generator)]
    states[:, -1] = 8 * case.tensors.lm_head[choices]
    optimizer = torch.optim.Adam(case.draft.parameters(), lr=1e-2)
    for _ in range(60):
        output = case.run([(ids, mask, states)], decay(3).float())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    plan = case.plan(pack([(ids, mask, states)]), 3)
    assert plan.trained.tolist() == plan.scored.tolist() == [10, 9, 8]
    assert accept_len(output.correct, plan.scored) > 3.9  # of 4


def test_state_dict_holds_the_exported_parameters_only() -> None:
    config = make_config(draft_vocab=25)
    draft = Eagle3Draft(config, torch.zeros(40, 24), torch.arange(25))
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert shapes == {
        "fc.weight": (24, 48),
        "midlayer.input_layernorm.weight": (24,),
        "midlayer.hidden_norm.weight": (24,),
        "midlayer.post_attention_layernorm.weight": (24,),
        "midlayer.self_attn.q_proj.weight": (32, 48),
        "midlayer.self_attn.k_proj.weight": (16, 48),
        "midlayer.self_attn.v_proj.weight": (16, 48),
        "midlayer.self_attn.o_proj.weight": (24, 32),
        "midlayer.mlp.gate_proj.weight": (40, 24),
        "midlayer.mlp.up_proj.weight": (40, 24),
        "midlayer.mlp.down_proj.weight": (24, 40),
        "norm.weight": (24,),
        "lm_head.weight": (25, 24),
    }
    assert set(shapes) == {name for name, _ in draft.named_parameters()}


def test_vocabulary_maps_are_offsets_and_a_mask() -> None:
    kept = torch.tensor([1, 4, 5, 39])
    draft = Eagle3Draft(make_config(draft_vocab=4), torch.zeros(40, 24), kept)
    assert (torch.arange(4) + draft.d2t).tolist() == kept.tolist()
    assert draft.t2d.nonzero()[:, 0].tolist() == kept.tolist()


@pytest.mark.parametrize(
    ("kept", "draft_vocab"),
    [(None, 25), (torch.arange(24), 25), (torch.tensor([1, 0]), 2), (torch.tensor([1, 1]), 2)],
)
def test_impossible_vocabularies(kept: torch.Tensor | None, draft_vocab: int) -> None:
    with pytest.raises(ValueError, match="kept_ids"):
        Eagle3Draft(make_config(draft_vocab=draft_vocab), torch.zeros(40, 24), kept)


def test_initial_weights_follow_from_target_and_seed() -> None:
    kept = torch.tensor([2, 3, 30])
    target = TargetTensors(torch.randn(40, 24), torch.rand(24), torch.randn(40, 24))
    drafts = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(drafts))  # must not matter
        draft = Eagle3Draft(make_config(draft_vocab=3), target.embedding, kept)
        draft.initialize(target, seed)
        drafts.append(draft.state_dict())
    first, again, other = drafts
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["lm_head.weight"], target.lm_head[kept])
    assert torch.equal(first["norm.weight"], target.norm)
    assert first["midlayer.hidden_norm.weight"].unique().tolist() == [1.0]
    assert first["fc.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
