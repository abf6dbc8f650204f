"""Floating-point operations of a training step, counted by formula."""

from __future__ import annotations

from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.plan import TTTPlan


def step_flops(config: Eagle3Config, plan: TTTPlan, trains_head: bool = True) -> float:
    """FLOP of forward and backward of a micro-batch, as they are needed.

    A product of [m, k] and [k, n] counts 2mkn; elementwise work counts nothing, and neither does
    what gradient checkpointing computes again.  Forward and backward of a layer are three products,
    where the input needs no gradient two.

    - ``fc``: every token, no gradient of its input.
    - Queries, keys and values: the half that reads the embedding for every token (frozen: its
      input's gradient reaches a norm's weight, so three products), the half that reads the hidden
      state for every token in step 0 (keys, values) and for the rows of each step.
    - ``o_proj`` and MLP: the rows of each step.
    - Attention: two products forward and four backward over the (row, key) pairs of block 0.
    - Draft head: each prediction, forward and backward; frozen: two products.
    - Target head: each target position once; for a pruned vocabulary the whole head for the
      target's choice and the kept rows for its distribution.
    """
    hidden = config.hidden_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = 2 * config.num_key_value_heads * config.head_dim
    num_tokens = int(plan.steps[0].cu_seqlens[-1])
    num_rows = plan.num_states
    later_rows = num_rows - len(plan.steps[0].index)

    per_token = 2 * 2 * len(config.aux_layers) * hidden * hidden
    per_token += 3 * 2 * hidden * (q_width + kv_width)  # of the embedding
    per_token += 3 * 2 * hidden * kv_width  # of the hidden state, step 0
    per_row = 3 * 2 * hidden * (2 * q_width + 3 * config.intermediate_size)
    attention = 6 * 2 * q_width * plan.num_scores
    predictions = (
        (3 if trains_head else 2) * 2 * hidden * config.draft_vocab_size * int(plan.trained.sum())
    )
    targets = 2 * hidden * config.draft_vocab_size * len(plan.targets)
    if config.draft_vocab_size < config.vocab_size:
        targets += 2 * hidden * config.vocab_size * int(plan.scored[0])
    return float(
        per_token * num_tokens
        + per_row * num_rows
        + 3 * 2 * hidden * kv_width * later_rows
        + attention
        + predictions
        + targets
    )
