"""Kills a process before the first, second, ... file operation of a save; loads what is left.

Prints a line for each: how the process ended, and the step that was loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training import tiny
from tests.training.saved import checkpointer
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import BestCheckpoint, latest_checkpoint
from torchspec_hpc.config.checkpoint_meta import Progress

#: What the interpreter announces before it changes, or opens, a file.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_a_child(act: Callable[[], int]) -> int:
    """Runs it in a forked process; returns the exit code, or minus the signal."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    code = 99
    try:
        code = act()
    finally:
        if code == 99:
            traceback.print_exc()
        os._exit(code)  # a child must not go on as its parent


def save(run: RunDir, kill_at: int) -> int:
    """Saves step 1, then step 2 until it is killed."""
    saver = checkpointer(run, tiny.draft())
    saver.save(Progress(1, 6, accept_len=1.5))
    saver.wait()
    num_operations = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_operations
        if event in OPERATIONS and str(run.checkpoints) in str(arguments[0]):
            if num_operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            num_operations += 1

    sys.addaudithook(hook)
    saver.save(Progress(2, 12, accept_len=2.5))
    saver.wait()
    return 0


def load(run: RunDir) -> int:
    """Resumes as an attempt would, saves on, and returns the step."""
    folder = latest_checkpoint(run)
    assert folder is not None
    loader = checkpointer(run, tiny.draft())
    progress = loader.load(folder)
    best = BestCheckpoint.read(run)
    assert best is not None
    assert best.step == progress.step  # each is better than the one before
    assert loader.best_accept_len == best.accept_len == {1: 1.5, 2: 2.5}[best.step]
    loader.save(Progress(2, 12))
    loader.save(Progress(3, 18))
    loader.wait()
    assert latest_checkpoint(run) == run.checkpoints / "step_3"
    assert not list(run.checkpoints.glob("*.tmp"))
    return progress.step


if __name__ == "__main__":
    torch.set_num_threads(1)
    ended, kill_at = -signal.SIGKILL, 0
    while ended == -signal.SIGKILL:
        directory = RunDir(Path(sys.argv[1]) / str(kill_at))
        ended = in_a_child(partial(save, directory, kill_at))
        print(ended, in_a_child(partial(load, directory)), flush=True)
        kill_at += 1
