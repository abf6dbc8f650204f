"""EAGLE-3's training-time test written a second time: one position after the other, float64.

Shares no code with the package on purpose.  Follows the alignment table of the design word by
word; slow, and short enough to be checked by reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Result:
    loss: Tensor
    loss_sums: list[Tensor]
    correct: list[int]
    scored: list[int]
    trained: list[int]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotates the pairs (k, k + d/2); angles are rounded to float32, as transformers does."""
    d = x.shape[0]
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    angle = torch.tensor(float(position)) * (1.0 / theta**exponent)
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    turned = torch.complex(x[: d // 2], x[d // 2 :]) * turn
    return torch.cat([turned.real, turned.imag])


def heads(x: Tensor, head_dim: int) -> list[Tensor]:
    return [x[a : a + head_dim] for a in range(0, x.shape[0], head_dim)]


def unroll_document(w, cfg, embedding, x, aux, k_steps):
    """Returns g[i][t], the layer's output of step i at position t, wherever x_{t+1+i} exists."""
    length = len(x)
    attn = "midlayer.self_attn."
    g = [w["fc.weight"] @ a for a in aux]  # g^0
    keys, values, outputs = [], [], []  # by step, then by position
    for i in range(k_steps):
        positions = range(length - 1 - i)
        k_i, v_i, q_i = [], [], []
        for t in positions:
            e = norm(embedding[x[t + 1 + i]], w["midlayer.input_layernorm.weight"], cfg["eps"])
            h = norm(g[t], w["midlayer.hidden_norm.weight"], cfg["eps"])
            z = torch.cat([e, h])
            d, theta = cfg["head_dim"], cfg["theta"]
            q_i.append([rope(q, t + i, theta) for q in heads(w[attn + "q_proj.weight"] @ z, d)])
            k_i.append([rope(k, t + i, theta) for k in heads(w[attn + "k_proj.weight"] @ z, d)])
            v_i.append(heads(w[attn + "v_proj.weight"] @ z, d))
        keys.append(k_i)
        values.append(v_i)
        out = []
        for t in positions:
            read = []
            for head, q in enumerate(q_i[t]):
                kv = head * cfg["kv_heads"] // cfg["heads"]
                seen = [(keys[0][s][kv], values[0][s][kv]) for s in range(t + 1)]
                seen += [(keys[j][t][kv], values[j][t][kv]) for j in range(1, i + 1)]
                scores = torch.stack([q @ k / cfg["head_dim"] ** 0.5 for k, _ in seen])
                p = torch.exp(scores - scores.max())
                p = p / p.sum()
                read.append(sum(p_s * v for p_s, (_, v) in zip(p, seen, strict=True)))
            r = g[t] + w[attn + "o_proj.weight"] @ torch.cat(read)
            m = norm(r, w["midlayer.post_attention_layernorm.weight"], cfg["eps"])
            gate = w["midlayer.mlp.gate_proj.weight"] @ m
            up = w["midlayer.mlp.up_proj.weight"] @ m
            out.append(r + w["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
        outputs.append(out)
        g = out  # not detached
    return outputs


def ttt(w, cfg, embedding, target_norm, target_head, kept, documents, step_weights, num_trained):
    """All documents of one micro-batch.

    Args:
        w: The draft's parameters by name, float64.
        cfg: eps, theta, heads, kv_heads, head_dim.
        embedding: [V, H].
        target_norm: [H].
        target_head: [V, H].
        kept: List of kept ids or None.
        documents: (token ids [T], loss mask [T], states [T, A+1, H]) each.
        step_weights: One number a step.
        num_trained: One number a step, or None: those of these documents.
    """
    k_steps = len(step_weights)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(k_steps)]
    correct, scored, trained = [0] * k_steps, [0] * k_steps, [0] * k_steps
    for x, mask, states in documents:
        length = len(x)
        states = states.double()
        g = unroll_document(w, cfg, embedding, x, [s[:-1].reshape(-1) for s in states], k_steps)
        for i in range(k_steps):
            for t in range(length):
                if not (t + 2 + i <= length - 1 and mask[t + 2 + i]):
                    continue
                scored[i] += 1
                target = target_head @ norm(states[t + 1 + i, -1], target_norm, cfg["eps"])
                target = torch.exp(target - target.max())
                choice = int(target.argmax())
                if kept is not None and choice not in kept:
                    continue  # not supervised, and a miss
                trained[i] += 1
                p = target if kept is None else target[kept]
                p = p / p.sum()
                q = w["lm_head.weight"] @ norm(g[i][t], w["norm.weight"], cfg["eps"])
                log_q = q - q.max() - torch.log(torch.exp(q - q.max()).sum())
                sums[i] = sums[i] - (p * log_q).sum()
                drafted = int(q.argmax()) if kept is None else kept[int(q.argmax())]
                correct[i] += drafted == choice
    counts = trained if num_trained is None else num_trained
    terms = zip(step_weights, sums, counts, strict=True)
    loss = sum(weight * s / n for weight, s, n in terms if n > 0)
    return Result(loss, sums, correct, scored, trained)
