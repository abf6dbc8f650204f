from __future__ import annotations

from torchspec_hpc.training.reporter import line

VALUES = {
    "train/loss": 7.25,
    "train/accept_len": 2.125,
    "train/lr": 1e-4,
    "train/grad_norm": float("nan"),
    "train/skipped_steps": 0,
    "throughput/tokens_per_s": 1234.5,
    "throughput/wait_share": 0.25,
    "memory/peak_bytes": 3 * 2**30,
}


def test_a_line_for_people():
    assert line(VALUES) == (
        "loss 7.2500  accept_len 2.125  lr 1.00e-04  grad_norm nan  1234 tokens/s  waiting 25%  "
        "memory 3.0 GiB"
    )
    more = {"throughput/mfu": 0.405, "train/skipped_steps": 2}
    assert line(VALUES | more).endswith("memory 3.0 GiB  mfu 40.5%  skipped 2")
