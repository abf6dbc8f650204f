"""The numbers of a step: summed over ranks, named as TensorBoard shows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_hpc.drafts.eagle3.ttt import accept_len
from torchspec_hpc.training.parallel import World, gather_over_ranks
from torchspec_hpc.training.step import StepResult
from torchspec_hpc.transfer.control import ControlClient

#: What is written, by tag.  ``<i>`` is the TTT step, counted from 0.
TAGS = {
    "train/loss": "token-weighted loss of the optimizer step, over all TTT steps",
    "train/loss_step_<i>": "soft cross entropy per trained position of TTT step i",
    "train/acc_step_<i>": "share of scored positions of TTT step i where the draft is right",
    "train/accept_len": "training estimate of acceptance length, bonus token included",
    "train/lr": "learning rate",
    "train/grad_norm": "L2 norm of the gradient before clipping",
    "train/skipped_steps": "steps of this attempt whose gradient was not finite",
    "train/epoch": "passes over the data so far",
    "eval/<loss, loss_step_<i>, acc_step_<i>, accept_len>": "the same of the held-out samples",
    "throughput/tokens_per_s": "tokens trained on per second, all ranks",
    "throughput/train_tokens_per_s": "the same without the time spent waiting for data",
    "throughput/inference_tokens_per_s": "tokens per second of all engines while they work",
    "throughput/step_s": "seconds per optimizer step, slowest rank",
    "throughput/wait_share": "share of the step spent waiting for data, slowest rank",
    "transfer/bytes_per_s": "hidden states through the store per second, all ranks",
    "transfer/bytes_per_token": "hidden states per token",
    "transfer/retries": "requests asked again in this step, all ranks",
    "transfer/queue_depth": "requests that no engine has taken yet",
    "transfer/refused": "requests that the living engines have refused so far",
}


@dataclass(frozen=True)
class Costs:
    """What a step of one rank took.

    Attributes:
        num_tokens: Tokens trained on.
        num_bytes: Hidden states that arrived meanwhile.
        num_retries: Requests asked again meanwhile.
        wait_s: Spent waiting for data.
        step_s: Spent in all.
    """

    num_tokens: int
    num_bytes: int
    num_retries: int
    wait_s: float
    step_s: float


class Meter:
    """Turns each rank's sums into the run's numbers; every rank calls it at every step.

    Args:
        world: The training group.
        step_weights: Weight of the loss of each TTT step.
    """

    def __init__(self, world: World, step_weights: list[float]) -> None:
        self._world, self._weights = world, step_weights

    def measure(self, result: StepResult, costs: Costs) -> dict[str, float]:
        """Gathers a step over all ranks and names its numbers."""
        mine = [costs.num_tokens, costs.num_bytes, costs.num_retries, costs.wait_s, costs.step_s]
        row = torch.cat([result.sums.flatten(), result.sums.new_tensor(mine)])
        rows = gather_over_ranks(row).cpu()  # [world size, 4K + 5]
        sums = rows[:, :-5].sum(0).view(result.sums.shape)
        num_tokens, num_bytes, num_retries = rows[:, -5:-2].sum(0).tolist()
        wait_s, step_s = rows[:, -2:].amax(0).tolist()
        return {
            **self._learning("train", sums),
            "train/grad_norm": result.grad_norm,
            "throughput/tokens_per_s": num_tokens / step_s,
            "throughput/train_tokens_per_s": num_tokens / max(step_s - wait_s, 1e-9),
            "throughput/step_s": step_s,
            "throughput/wait_share": wait_s / step_s,
            "transfer/bytes_per_s": num_bytes / step_s,
            "transfer/bytes_per_token": num_bytes / num_tokens,
            "transfer/retries": num_retries,
        }

    def evaluate(self, sums: Tensor) -> dict[str, float]:
        """Gathers the ``sums`` [4, K] of an evaluation over all ranks and names its numbers."""
        return self._learning("eval", gather_over_ranks(sums).sum(0).cpu())

    def _learning(self, part: str, sums: Tensor) -> dict[str, float]:
        """Loss and accuracy of ``sums`` [4, K]; a TTT step without positions has no number."""
        loss_sums, correct, scored, trained = sums
        losses = {i: float(loss_sums[i] / n) for i, n in enumerate(trained.tolist()) if n}
        accuracies = {i: float(correct[i] / n) for i, n in enumerate(scored.tolist()) if n}
        return {
            f"{part}/loss": sum(self._weights[i] * loss for i, loss in losses.items()),
            **{f"{part}/loss_step_{i}": loss for i, loss in losses.items()},
            **{f"{part}/acc_step_{i}": accuracy for i, accuracy in accuracies.items()},
            f"{part}/accept_len": accept_len(correct, scored),
        }


class EngineMonitor:
    """What the engines say of themselves in their heartbeats.

    Args:
        control: Connection to the control store.
        stale_s: A heartbeat older than this is of an engine that is gone.
    """

    def __init__(self, control: ControlClient, stale_s: float) -> None:
        self._control, self._stale_s = control, stale_s
        self._before: dict[int, tuple[int, float]] = {}
        self._speeds: dict[int, float] = {}

    def read(self) -> dict[str, float]:
        """Speed of the inference group and the requests that wait for it."""
        beats = self._control.heartbeats("inference").items()
        beats_now = {rank: beat for rank, beat in beats if beat["age_s"] <= self._stale_s}
        alive = {rank: (beat["tokens"], beat["busy_s"]) for rank, beat in beats_now.items()}
        for rank, (tokens, busy_s) in alive.items():
            tokens_before, busy_before_s = self._before.get(rank, (0, 0.0))
            if busy_s > busy_before_s:
                self._speeds[rank] = (tokens - tokens_before) / (busy_s - busy_before_s)
        self._before = alive  # an engine that was started again counts from 0
        values: dict[str, float] = {
            "transfer/queue_depth": self._control.queue_depth(),
            "transfer/refused": sum(beat["refused"] for beat in beats_now.values()),
        }
        if speeds := [self._speeds[rank] for rank in alive if rank in self._speeds]:
            values["throughput/inference_tokens_per_s"] = sum(speeds)
        return values
