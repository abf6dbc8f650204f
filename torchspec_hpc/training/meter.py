"""The numbers of a step: summed over ranks, named as TensorBoard shows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_hpc.drafts.eagle3.ttt import accept_len
from torchspec_hpc.training.parallel import World, gather_over_ranks
from torchspec_hpc.training.step import StepResult
from torchspec_hpc.transfer.control import ControlClient

#: What is written, by tag, with its unit.  ``<i>`` is the TTT step, counted from 0.
TAGS = {
    "train/loss": "token-weighted loss of the optimizer step, over all TTT steps, nats",
    "train/loss_step_<i>": "loss per trained position of TTT step i, nats",
    "train/acc_step_<i>": "share of scored positions of TTT step i where the draft is right",
    "train/accept_len": "training estimate of acceptance length in tokens, bonus token included",
    "train/lr": "learning rate",
    "train/grad_norm": "L2 norm of the gradient before clipping",
    "train/skipped_steps": "steps of the run so far whose gradient was not finite",
    "train/epoch": "passes over the data so far",
    "train/supervised_share": "share of tokens that TTT step 0 was trained on",
    "train/rows_left_out_share": "share of rows of the TTT steps that nothing needed",
    "eval/<loss, loss_step_<i>, acc_step_<i>, accept_len>": "the same of the held-out samples",
    "throughput/tokens_per_s": "tokens trained on per second, all ranks",
    "throughput/train_tokens_per_s": "the same without the time spent waiting for data",
    "throughput/inference_tokens_per_s": "tokens per second of all engines while they work",
    "throughput/wait_share": "share of the step spent waiting for data, slowest rank",
    "throughput/flops_per_s": "floating point operations per second by formula, all ranks",
    "throughput/mfu": "the same as a share of the devices' peak; only where that is known",
    "time/step_s": "seconds per optimizer step, report included, slowest rank",
    "time/wait_s": "seconds of it spent waiting for data, slowest rank",
    "time/compute_s": "seconds of it for forward, backward and gradient norm, slowest rank",
    "time/optimizer_s": "seconds of it for the update, slowest rank",
    "time/checkpoint_s": "seconds that a checkpoint held training up before it, slowest rank",
    "memory/peak_bytes": "GPU: most that tensors have taken so far; CPU: resident; fullest rank",
    "transfer/bytes_per_s": "bytes of hidden states through the store per second, all ranks",
    "transfer/bytes_per_token": "bytes of hidden states per token",
    "transfer/retries": "requests asked again since the step before, all ranks",
    "transfer/queue_depth": "requests that no engine has taken yet",
    "transfer/refused": "requests that the living engines have refused so far",
}


@dataclass(frozen=True)
class Costs:
    """What a step of one rank took, beside what its :class:`StepResult` says.

    Attributes:
        num_tokens: Tokens trained on.
        num_bytes: Hidden states that arrived since the step before.
        num_retries: Requests asked again since then.
        wait_s: Spent waiting for data.
        step_s: Spent in all since then, but for checkpoints and evaluations.
        checkpoint_s: Spent on a checkpoint since then.
        memory_bytes: Held by tensors or by the process.
    """

    num_tokens: int
    num_bytes: int
    num_retries: int
    wait_s: float
    step_s: float
    checkpoint_s: float
    memory_bytes: int


class Meter:
    """Turns each rank's sums into the run's numbers; every rank calls it at every step.

    Args:
        world: The training group.
        step_weights: Weight of the loss of each TTT step.
        peak_flops: Of one rank's device, in FLOP/s; None: not known.
    """

    def __init__(
        self, world: World, step_weights: list[float], peak_flops: float | None = None
    ) -> None:
        self._world, self._weights, self._peak_flops = world, step_weights, peak_flops

    def measure(self, result: StepResult, costs: Costs) -> dict[str, float]:
        """Gathers a step over all ranks, in one collective, and names its numbers."""
        added = {
            "tokens": costs.num_tokens,
            "bytes": costs.num_bytes,
            "retries": costs.num_retries,
            "flops": result.flops,
            "rows": result.rows_computed,
            "all_rows": result.rows_total,
        }
        largest = {
            "time/step_s": costs.step_s,
            "time/wait_s": costs.wait_s,
            "time/compute_s": result.compute_s,
            "time/optimizer_s": result.optimizer_s,
            "time/checkpoint_s": costs.checkpoint_s,
            "memory/peak_bytes": costs.memory_bytes,
        }
        mine = result.sums.new_tensor([*added.values(), *largest.values()])
        rows = gather_over_ranks(torch.cat([result.sums.flatten(), mine])).cpu()
        sums, adds, maxima = torch.split(
            rows, [result.sums.numel(), len(added), len(largest)], dim=1
        )
        sums = sums.sum(0).view(result.sums.shape)
        total = dict(zip(added, adds.sum(0).tolist(), strict=True))
        worst = dict(zip(largest, maxima.amax(0).tolist(), strict=True))
        return {
            **self._learning("train", sums),
            "train/grad_norm": result.grad_norm,
            "train/supervised_share": float(sums[3, 0]) / total["tokens"],
            "train/rows_left_out_share": 1 - total["rows"] / total["all_rows"],
            **worst,
            **self._speed(total, worst["time/step_s"], worst["time/wait_s"]),
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

    def _speed(self, total: dict[str, float], step_s: float, wait_s: float) -> dict[str, float]:
        """Rates of the sums over all ranks."""
        values = {
            "throughput/tokens_per_s": total["tokens"] / step_s,
            "throughput/train_tokens_per_s": total["tokens"] / max(step_s - wait_s, 1e-9),
            "throughput/wait_share": wait_s / step_s,
            "throughput/flops_per_s": total["flops"] / step_s,
            "transfer/bytes_per_s": total["bytes"] / step_s,
            "transfer/bytes_per_token": total["bytes"] / total["tokens"],
            "transfer/retries": total["retries"],
        }
        if self._peak_flops is not None:
            peak = self._world.size * self._peak_flops
            values["throughput/mfu"] = total["flops"] / step_s / peak
        return values


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
