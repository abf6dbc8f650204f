"""Settings of the Slurm job."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from torchspec_hpc.config.types import Section, Strs

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_TIME_FORMATS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, UNLIMITED, INFINITE"


def time_limit_s(text: str) -> float:
    """Seconds of a wall time as ``sbatch --time`` reads it; no limit is infinity.

    Raises:
        ValueError: Slurm has no such format.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time of Slurm's; allowed: {_TIME_FORMATS}")
    days, *numbers = (None if part is None else int(part) for part in match.groups())
    first, second, third = numbers
    if days is None and third is None:  # minutes, or minutes and seconds
        first, second, third = 0, first, second
    seconds = ((days or 0) * 24 + (first or 0)) * 3600 + (second or 0) * 60 + (third or 0)
    return seconds or math.inf  # zero asks for no limit


def _check_time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads bare minutes as a number
    if isinstance(value, str):
        time_limit_s(value)
    return value


class SlurmGroupConfig(Section):
    """Resources of one component of the het job, per node."""

    partition: str | None = Field(None, description="null: the cluster's default.")
    constraint: str | None = Field(None, description="As in --constraint; null: any node.")
    cpus_per_task: int = Field(8, ge=1, description="CPUs of one engine or trainer.")
    mem: str | None = Field(
        None, description="Memory per node as Slurm spells it, e.g. 240G; null: the default."
    )
    gpus: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="How GPUs are asked for; none: a CPU partition."
    )
    gpu_type: str | None = Field(None, description="As in --gres=gpu:TYPE:N; null: any.")
    extra: Strs = Field((), description="Further sbatch options, without the leading #SBATCH.")


class SlurmConfig(Section):
    """The Slurm job. Only used when ``cluster`` is ``slurm``."""

    account: str | None = Field(None, description="Who pays, as in --account; null: your default.")
    qos: str | None = Field(None, description="As in --qos; null: your default.")
    reservation: str | None = Field(None, description="As in --reservation; null: none.")
    time: Annotated[str, BeforeValidator(_check_time)] = Field(
        "04:00:00", description="Wall time of one attempt, as in --time; UNLIMITED: no limit."
    )
    signal_before_s: int = Field(
        600, ge=10, description="Warning before the time limit, seconds: time for a checkpoint."
    )
    requeue: bool = Field(True, description="Unfinished runs go back into the queue.")
    max_attempts: int = Field(100, ge=1, description="Attempts of the whole run, crashes too.")
    network_interface: str | None = Field(
        None, description="For GLOO_ and NCCL_SOCKET_IFNAME; null: the libraries choose."
    )
    setup: Strs = Field((), description="Shell lines before anything else: module load ...")
    python: str | None = Field(None, description="Interpreter on the nodes; null: this one.")
    inference: SlurmGroupConfig = SlurmGroupConfig()
    training: SlurmGroupConfig = SlurmGroupConfig()

    @model_validator(mode="after")
    def _warns_in_time(self) -> SlurmConfig:
        if self.signal_before_s >= (limit_s := time_limit_s(self.time)):
            raise ValueError(
                f"signal_before_s = {self.signal_before_s} is not less than time = {self.time}; "
                f"allowed: less than {limit_s:.0f} seconds, or a longer time"
            )
        return self
