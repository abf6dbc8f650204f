"""Stands in for ``torchspec_hpc.training.launch``: one trainer, and no torch to load."""

from __future__ import annotations

import subprocess
import sys

arguments = sys.argv[1:]
sys.exit(subprocess.call([sys.executable, *arguments[arguments.index("-m") :]]))
