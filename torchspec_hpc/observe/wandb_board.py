"""The numbers of a run for Weights & Biases."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError

_PROJECT = "torchspec_hpc"
#: Longest wait for what is still to be uploaded at the end: less than a job that was told to
#: stop has left (control.stop_grace_s). What is left over stays on disk.
_FINISH_S = 10.0

logger = logging.getLogger(__name__)


def require_wandb() -> None:
    """Refuses to go on without the package, which it looks for but does not import.

    Raises:
        ConfigError: It is not installed.
    """
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # the latter: a folder ./wandb, which W&B leaves behind
        raise ConfigError(
            "logging.report_to has wandb, and the package wandb is not installed",
            hint="pip install 'torchspec_hpc[wandb]', or take wandb out of logging.report_to",
        )


class WandbBoard:
    """Points in a W&B run that goes on with every attempt of ours.

    W&B keeps the first value that it gets for a step, so steps that an earlier attempt has sent
    already are not sent again.  Training them anew gives the same numbers.

    Args:
        config: Of the run.
        run: Its directory, which holds W&B's files too.

    Raises:
        ConfigError: The package is not installed, or W&B does not take the run.
    """

    def __init__(self, config: Config, run: RunDir) -> None:
        require_wandb()
        import wandb  # an extra, and slow to import

        settings, mode = config.logging, config.logging.wandb_mode or "online"
        run.wandb.mkdir(exist_ok=True)
        try:
            self._run = wandb.init(
                project=settings.wandb_project or _PROJECT,
                entity=settings.wandb_entity,
                name=settings.wandb_name or run.root.name,
                group=settings.wandb_group or run.root.name,
                id=run.run_id,
                resume="allow",
                mode=mode,
                dir=run.root,
                config=_shown(config),
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, disable_code=True
                ),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"W&B does not take the run: {error}",
                hint="set WANDB_API_KEY or run `wandb login`; where nodes reach no network, set "
                "logging.wandb_mode to offline and upload with `wandb sync`",
            ) from error
        self._teardown, self._faults, self._lost = wandb.teardown, (wandb.Error, OSError), False
        sent = _last_step(run.wandb_steps)
        # online, W&B itself knows best: what a kill kept from it is sent again
        online = mode == "online"
        self._first_step = self._run.starting_step if online else sent + 1
        write_atomic(run.wandb_steps, f"{sent}\n")
        self._dir = run.wandb
        self._steps = run.wandb_steps.open("a", encoding="ascii")
        logger.info("W&B: %s", self._run.url if online else f"offline, in {run.wandb}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of a step, once."""
        if step < self._first_step or self._lost:
            return
        try:
            self._run.log(dict(values), step=step, commit=True)
        except self._faults as error:  # W&B's own process is gone; that must not end the training
            self._lost = True
            logger.warning("W&B gets nothing more of this attempt, from step %d: %r", step, error)
            return
        self._steps.write(f"{step}\n")
        self._steps.flush()

    def close(self, *, failed: bool) -> None:
        """Waits a while for uploads; a network that is gone must not cost the requeue."""
        self._steps.close()
        if self._lost:
            return
        finish = threading.Thread(target=self._finish, args=(int(failed),), daemon=True)
        finish.start()
        finish.join(_FINISH_S)
        if finish.is_alive():
            logger.warning("W&B has not taken all: `wandb sync` sends the rest of %s", self._dir)

    def _finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
        self._teardown(exit_code)  # ends W&B's own process, which else may write after us


def _shown(config: Config) -> dict[str, Any]:
    """What says something about the training; what may hold secrets stays here."""
    shown = config.model_dump(
        mode="json", include={"run_name", "model", "dataset", "training", "inference"}
    )
    del shown["inference"]["vllm"]["extra_args"]
    return shown


def _last_step(path: Path) -> int:
    """The last step that was sent; 0 before the first.  A kill may have cut the last line."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    return max((int(line) for line in lines if line.endswith("\n")), default=0)
