from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.services import SECRET, control_server
from torchspec_hpc.training import meter as meter_module
from torchspec_hpc.training.meter import TAGS, Costs, EngineMonitor, Meter
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.step import StepResult
from torchspec_hpc.transfer.control import ControlClient


@pytest.fixture
def meter() -> Iterator[Meter]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Meter(World(0, 1, torch.device("cpu")), [1.0, 0.5, 0.25], peak_flops=4e15)
    dist.destroy_process_group()


# cross entropy, correct, scored, trained; nothing is long enough for the third TTT step
SUMS = torch.tensor([[8.0, 9.0, 0.0], [5, 2, 0], [10, 8, 0], [4, 3, 0]], dtype=torch.float64)


def costs(**values: float) -> Costs:
    settings = {
        "num_tokens": 100,
        "num_bytes": 4000,
        "num_retries": 1,
        "wait_s": 0.5,
        "step_s": 2.0,
        "checkpoint_s": 0.75,
        "memory_bytes": 2**40 + 1,
    }
    return Costs(**settings | values)


def result(**values: float) -> StepResult:
    settings = {
        "flops": 3e15,
        "rows_computed": 240,
        "rows_total": 300,
        "compute_s": 1.25,
        "optimizer_s": 0.125,
    }
    return StepResult(SUMS, 0.25, applied=True, flagged=False, **settings | values)


def test_numbers_of_a_step(meter: Meter):
    values = meter.measure(result(), costs())
    assert values == pytest.approx(
        {
            "train/loss": 2.0 + 0.5 * 3.0,
            "train/loss_step_0": 2.0,
            "train/loss_step_1": 3.0,
            "train/acc_step_0": 0.5,
            "train/acc_step_1": 0.25,
            "train/accept_len": 1 + 0.5 + 0.5 * 0.25,
            "train/grad_norm": 0.25,
            "train/supervised_share": 0.04,
            "train/rows_left_out_share": 0.2,
            "throughput/tokens_per_s": 50.0,
            "throughput/train_tokens_per_s": 100 / 1.5,
            "throughput/wait_share": 0.25,
            "throughput/flops_per_s": 1.5e15,
            "throughput/mfu": 0.375,
            "time/step_s": 2.0,
            "time/wait_s": 0.5,
            "time/compute_s": 1.25,
            "time/optimizer_s": 0.125,
            "time/checkpoint_s": 0.75,
            "memory/peak_bytes": 2**40 + 1,
            "transfer/bytes_per_s": 2000.0,
            "transfer/bytes_per_token": 40.0,
            "transfer/retries": 1.0,
        },
        rel=1e-15,
    )
    described = {tag.replace("<i>", i) for tag in TAGS for i in "012"}
    assert values.keys() <= described


def test_ranks_are_added_up_or_the_worst_one_counts(meter: Meter, monkeypatch):
    other = result(flops=1e15, rows_computed=60, compute_s=1.5, optimizer_s=0.0625)
    rows = []
    monkeypatch.setattr(
        meter_module, "gather_over_ranks", lambda row: rows.append(row) or row[None]
    )
    meter.measure(other, costs(num_tokens=60, step_s=2.5, wait_s=0.25, memory_bytes=5))
    monkeypatch.setattr(meter_module, "gather_over_ranks", lambda row: torch.stack([*rows, row]))
    two = Meter(World(0, 2, torch.device("cpu")), [1.0, 0.5, 0.25], peak_flops=4e15)
    values = two.measure(result(), costs())
    assert values["train/loss"] == pytest.approx(3.5)  # the same positions twice
    assert values["train/supervised_share"] == 8 / 160
    assert values["train/rows_left_out_share"] == 0.5
    assert values["time/step_s"] == 2.5
    assert values["time/wait_s"] == 0.5
    assert values["time/compute_s"] == 1.5
    assert values["time/optimizer_s"] == 0.125
    assert values["memory/peak_bytes"] == 2**40 + 1
    assert values["throughput/tokens_per_s"] == 64.0
    assert values["throughput/flops_per_s"] == 1.6e15
    assert values["throughput/mfu"] == pytest.approx(0.2)


def test_there_is_no_mfu_where_the_peak_is_not_known(meter: Meter):
    values = Meter(meter._world, [1.0, 0.5, 0.25]).measure(result(), costs())
    assert "throughput/mfu" not in values
    assert values["throughput/flops_per_s"] == 1.5e15


@pytest.mark.parametrize("peak_flops", [4e15, None])
def test_a_step_costs_one_collective(meter: Meter, monkeypatch, peak_flops):
    calls = []
    gather = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *a: (calls.append(a), gather(*a)))
    Meter(meter._world, [1.0, 0.5, 0.25], peak_flops).measure(result(), costs())
    assert len(calls) == 1


def test_numbers_of_an_evaluation(meter: Meter):
    values = meter.evaluate(SUMS)
    assert values["eval/accept_len"] == pytest.approx(1.625)
    assert "eval/acc_step_2" not in values


def test_engines_are_as_fast_as_between_their_heartbeats():
    with control_server() as server:
        control = ControlClient(server.endpoint, SECRET, timeout_s=10)
        monitor = EngineMonitor(control, stale_s=60)
        # no engine has worked yet
        assert monitor.read() == {"transfer/queue_depth": 0, "transfer/refused": 0}

        def beat(rank: int, tokens: int, busy_s: float) -> float:
            control.heartbeat("inference", rank, {"tokens": tokens, "busy_s": busy_s, "refused": 1})
            return monitor.read()["throughput/inference_tokens_per_s"]

        assert beat(0, 100, 2.0) == 50
        assert beat(1, 100, 4.0) == 75
        assert beat(0, 400, 3.0) == 325
        assert beat(0, 400, 3.0) == 325  # idle: as fast as it was
        assert beat(0, 10, 1.0) == 325  # started again
        assert beat(0, 40, 2.0) == 55
        assert monitor.read()["transfer/refused"] == 2
        assert set(monitor.read()) <= set(TAGS)
        control.close()
