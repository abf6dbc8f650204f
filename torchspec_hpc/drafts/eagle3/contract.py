"""The contract of a published draft: names, shapes, dtypes and values of its tensors.

Engines do not check it: vLLM refuses unknown tensors but silently accepts missing
ones, SGLang skips both.  A draft without ``fc.weight`` loads and generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class ContractError(UserError):
    """Tensors that no engine could serve rightly.

    Args:
        violations: All that is wrong.
        hint: What to do next.
    """

    def __init__(self, violations: list[str], hint: str) -> None:
        self.violations = violations
        super().__init__(
            "this draft breaks the contract:\n  - " + "\n  - ".join(violations), hint=hint
        )


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor must look like."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS


def eagle3_contract(config: Eagle3Config) -> dict[str, TensorSpec]:
    """Required tensors of an EAGLE-3 draft of the Llama type, by the name of the parameter."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "fc.weight": (hidden, len(config.aux_layers) * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
    }
    contract = {name: TensorSpec(shape) for name, shape in shapes.items()}
    if config.draft_vocab_size < config.vocab_size:  # vLLM refuses a map that maps nothing
        contract["d2t"] = TensorSpec((config.draft_vocab_size,), (torch.int64,))
        contract["t2d"] = TensorSpec((config.vocab_size,), (torch.bool,))
    return contract


def check_contract(tensors: Mapping[str, torch.Tensor], config: Eagle3Config, hint: str) -> None:
    """Checks tensors against the contract.

    Args:
        tensors: All of the draft, by the name of the parameter.
        config: The draft's shape.
        hint: What the user should do next where it is broken.

    Raises:
        ContractError: With every violation, not only the first.
    """
    contract = eagle3_contract(config)
    violations = [f"{name} is missing" for name in contract if name not in tensors]
    violations += [
        f"{name} is not part of the contract" for name in tensors if name not in contract
    ]
    for name in contract.keys() & tensors.keys():
        violations += _check_tensor(name, tensors[name], contract[name])
    if not violations and "d2t" in contract:
        violations += _check_vocabulary(tensors["d2t"], tensors["t2d"])
    if violations:
        raise ContractError(sorted(violations), hint)


def _check_tensor(name: str, tensor: torch.Tensor, spec: TensorSpec) -> list[str]:
    found = []
    if tuple(tensor.shape) != spec.shape:
        found.append(f"{name} has shape {tuple(tensor.shape)}, not {spec.shape}")
    if tensor.dtype not in spec.dtypes:
        found.append(f"{name} is {tensor.dtype}, not one of {', '.join(map(str, spec.dtypes))}")
    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
        found.append(f"{name} holds values that are not finite")
    return found


def _check_vocabulary(d2t: torch.Tensor, t2d: torch.Tensor) -> list[str]:
    """``d2t`` holds offsets: draft row i stands for target token ``i + d2t[i]``."""
    targets = torch.arange(d2t.numel()) + d2t
    if targets.min() < 0 or targets.max() >= t2d.numel():
        return ["d2t points outside the target's vocabulary"]
    if (targets.diff() <= 0).any():
        return ["d2t does not map to ascending, unique target tokens"]
    if not torch.equal(targets, t2d.nonzero().flatten()):
        return ["d2t and t2d keep different tokens"]
    return []
