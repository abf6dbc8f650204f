"""The settings themselves: each is described, and those that must fit together do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.config.logging_schema import LoggingConfig
from torchspec_hpc.config.schema import Config, TrainingConfig
from torchspec_hpc.config.slurm_schema import SlurmConfig, time_limit_s


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description


def test_every_setting_is_described() -> None:
    described = dict(leaves(Config))
    assert len(described) > 90
    assert [name for name, description in described.items() if not description] == []


def engines(gpus: int, per_engine: int, per_node: int, tp_size: int = 1, **more: Any) -> Any:
    return {
        "inference_num_gpus": gpus,
        "inference_num_gpus_per_engine": per_engine,
        "inference_num_gpus_per_node": per_node,
        "vllm": {"tp_size": tp_size},
        **more,
    }


def refuse(section: type[BaseModel], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (engines(3, 2, 2, 2), "inference_num_gpus = 3 is no multiple"),
        (engines(6, 6, 4, 6), "is more than inference_num_gpus_per_node = 4; allowed"),
        (engines(6, 2, 3, 2), "inference_num_gpus_per_node = 3 is no multiple"),
        (engines(2, 2, 2), "vllm.tp_size = 1 and inference_num_gpus_per_engine = 2 differ"),
        (engines(2, 1, 2, 2), "vllm.tp_size = 2 and inference_num_gpus_per_engine = 1 differ"),
        (engines(2, 2, 1, engine="hf"), "per_node = 1; allowed: engines that fit on one node"),
        (engines(2, 2, 2, engine="sglang"), "sglang.tp_size = 1 and .*_per_engine = 2 differ"),
        (engines(0, 1, 8), "inference_num_gpus = 0 without cache_dir"),
        (engines(1, 1, 1) | {"cache_max_bytes": "1GiB"}, "cache_dir, which is not set"),
        (engines(1, 1, 1) | {"cache_dir": "/x", "respond": "target"}, "answers are not kept"),
    ],
)
def test_engines_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    refuse(InferenceConfig, values, message)


@pytest.mark.parametrize(
    "values",
    [
        engines(16, 8, 8, 8),
        engines(16, 8, 4, 8),
        engines(2, 2, 3, 2),
        engines(4, 1, 1),
        engines(3, 1, 2),
    ],
)
def test_engines_that_fit(values: dict[str, Any]) -> None:
    group = InferenceConfig.model_validate(values)
    assert group.num_ranks <= group.num_nodes * group.ranks_per_node


def test_evaluation_needs_data() -> None:
    refuse(
        DatasetConfig,
        {"train_data_path": "x", "eval_interval": 3},
        "eval_interval = 3 needs eval_data_path",
    )


def test_micro_batches_count_tokens_or_samples() -> None:
    refuse(
        TrainingConfig,
        {"micro_batch_tokens": 4096, "micro_batch_size": 2},
        "micro_batch_tokens = 4096 and micro_batch_size = 2 are both given; allowed: one of them",
    )
    assert TrainingConfig(max_seq_length=512).pack_tokens == 512
    assert TrainingConfig(micro_batch_tokens=4096).pack_tokens == 4096
    assert TrainingConfig(micro_batch_size=2).pack_tokens is None


def test_weights_need_a_checkpoint() -> None:
    refuse(TrainingConfig, {"continual_training": True}, "continual_training = true needs load_p")


def test_a_floor_above_the_peak() -> None:
    refuse(
        TrainingConfig,
        {"learning_rate": 1e-4, "min_lr": 2e-4},
        "min_lr = 0.0002 is above learning_rate = 0.0001; allowed: 0 to 0.0001",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lr_wsd_decay_ratio": 0.3},
            "lr_wsd_decay_ratio = 0.3 has no effect with lr_decay_style = cosine; set that to WSD",
        ),
        (
            {"lr_decay_style": "linear", "lr_wsd_decay_style": "linear"},
            "lr_wsd_decay_style = linear has no effect .* or lr_wsd_decay_style to null",
        ),
        (
            {"lr_decay_style": "WSD", "warmup_ratio": 0.9},
            "warmup_ratio = 0.9 and lr_wsd_decay_ratio = 0.2 are more than the whole schedule",
        ),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_ratio": 0.0}, "greater than 0"),
        ({"lr_decay_style": "wsd"}, "'inverse-square-root' or 'WSD'"),
        (
            {"lr_decay_style": "constant", "min_lr": 0.0},
            "min_lr = 0.0 has no effect with lr_decay_style = constant; .* or min_lr to null",
        ),
    ],
)
def test_schedules_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    refuse(TrainingConfig, values, message)


@pytest.mark.parametrize("loss", ["forward_kl", {"lk_alpha": 1.0, "forward_kl": 0.5}])
def test_eta_needs_the_loss_that_it_is_of(loss: Any) -> None:
    message = r"lk_eta = 0.0 has no effect with loss_type = .*forward_kl; add lk_lambda"
    refuse(TrainingConfig, {"loss_type": loss, "lk_eta": 0.0}, message)


def test_defaults_of_what_may_be_null() -> None:
    assert TrainingConfig(loss_type="lk_lambda").kl_decay == 3.0
    assert TrainingConfig(loss_type={"lk_lambda": 1.0}, lk_eta=0.0).kl_decay == 0.0
    assert TrainingConfig().lowest_lr == 0.0
    assert TrainingConfig(min_lr=1e-5).lowest_lr == 1e-5


@pytest.mark.parametrize("report_to", [[], ["tensorboard"], "none"])
@pytest.mark.parametrize(("key", "value"), [("wandb_project", "p"), ("wandb_mode", "online")])
def test_wandb_keys_need_wandb(report_to: Any, key: str, value: str) -> None:
    message = rf"{key} = {value} has no effect with report_to = .*add wandb to that"
    refuse(LoggingConfig, {"report_to": report_to, key: value}, message)
    LoggingConfig.model_validate({"report_to": ["tensorboard", "wandb"], key: value})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("04:00:00", 4 * 3600),
        ("2-3", 51 * 3600),
        ("1-02:03", 26 * 3600 + 180),
        ("1-02:03:04", 26 * 3600 + 184),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("0", math.inf),
    ],
)
def test_times_as_slurm_reads_them(text: str, seconds: float) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1-", ":30", "1:2:3:4", "-1", "1-2:3:4:5", "1.5"])
def test_times_that_slurm_does_not_read(text: str) -> None:
    refuse(SlurmConfig, {"time": text}, "no time of Slurm's; allowed: minutes, MM:SS")


def test_minutes_may_be_a_number() -> None:
    assert SlurmConfig.model_validate({"time": 90}).time == "90"


def test_the_warning_comes_within_the_time() -> None:
    message = "signal_before_s = 600 is not less than time = 10; allowed: less than 600 seconds"
    refuse(SlurmConfig, {"time": "10", "signal_before_s": 600}, message)
    SlurmConfig.model_validate({"time": "10:01", "signal_before_s": 600})
    SlurmConfig.model_validate({"time": "UNLIMITED", "signal_before_s": 600})
