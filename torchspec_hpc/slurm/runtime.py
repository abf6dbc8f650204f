"""What the workers run in: the interpreter as it is, a venv, conda, or a container.

The supervisor always runs on the node itself, since it needs Slurm's programs; a container
therefore needs an interpreter there too, with this package and without torch.  Not tried on a
machine that has apptainer or pyxis.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torchspec_hpc.config.rundir import RunDir, cache_dir
from torchspec_hpc.config.schema import Config

#: Variables that name where the Hugging Face hub's files are.
_HUB_CACHES = ("HF_HOME", "HF_HUB_CACHE")


class Runtime:
    """The runtime of a run.

    Args:
        config: The run's settings.
        run: The run.
        code: Folder of this package; None: the run's own copy.
    """

    def __init__(self, config: Config, run: RunDir, code: Path | None = None) -> None:
        self._config, self._run = config, run
        self._code = code or run.code
        self._runtime = config.slurm.runtime

    @property
    def script_lines(self) -> list[str]:
        """What the batch script does to enter it."""
        path = shlex.quote(self._runtime.path or "")
        match self._runtime.kind:
            case "venv":
                return [f"source {shlex.quote(f'{self._runtime.path}/bin/activate')}"]
            case "conda":
                return ['eval "$(conda shell.bash hook)"', f"conda activate {path}"]
            case _:
                return []

    @property
    def node_python(self) -> str:
        """Interpreter of the supervisor."""
        if self._config.slurm.python is not None:
            return self._config.slurm.python
        if self._runtime.kind in ("venv", "conda"):
            return f"{self._runtime.path}/bin/python"
        return sys.executable

    @property
    def worker_python(self) -> str:
        """Interpreter of engines, trainers and services."""
        return self._runtime.python if self._runtime.is_container else self.node_python

    @property
    def shepherd_python(self) -> str:
        """Interpreter of what stands above them: outside of apptainer, inside of pyxis."""
        return self.worker_python if self._runtime.kind == "pyxis" else self.node_python

    @property
    def srun_options(self) -> list[str]:
        """Options that every ``srun`` needs."""
        if self._runtime.kind != "pyxis":
            return []
        mounts = ",".join(f"{path}:{path}" for path in self.mounts)
        return [
            f"--container-image={self._runtime.path}",
            f"--container-mounts={mounts}",
            f"--container-workdir={self._code}",
            *self._runtime.options,
        ]

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command as a node starts it."""
        if self._runtime.kind != "apptainer":
            return list(command)
        binds = [f"--bind={path}" for path in self.mounts]
        assert self._runtime.path
        return ["apptainer", "exec", "--nv", *binds, *self._runtime.options,
                self._runtime.path, *command]  # fmt: skip

    def service(self, command: Sequence[str], step_options: Sequence[str]) -> list[str]:
        """The command of a service as the supervisor starts it on its own node.

        Args:
            command: The command.
            step_options: Of ``srun``, to stay on this node; for pyxis, which knows steps only.
        """
        if self._runtime.kind != "pyxis":
            return self.enter(command)
        here = ["--nodes=1", "--ntasks=1", "--overlap", "--mem=0"]
        return ["srun", *step_options, *here, *self.srun_options, *command]

    @property
    def mounts(self) -> list[str]:
        """Directories that a container must see: what the configuration names, and more."""
        config = self._config
        files = [
            config.dataset.train_data_path,
            config.dataset.eval_data_path,
            config.dataset.chat_template,
            config.model.draft_model_config,
        ]
        wanted = [Path(file).parent for file in files if file]
        wanted += [Path(config.output_dir), cache_dir(config), self._run.logs.parent, self._code]
        folders = [
            config.model.target_model_path,
            config.model.initial_draft,
            config.training.load_path,
            config.inference.cache_dir,
            *(config.slurm.environment.get(name) for name in _HUB_CACHES),
        ]
        wanted += [Path(folder) for folder in folders if folder and Path(folder).is_absolute()]
        wanted += map(Path, self._runtime.mounts)
        tops = {p for p in wanted if not any(q != p and q in p.parents for q in wanted)}
        return sorted(map(str, tops))
