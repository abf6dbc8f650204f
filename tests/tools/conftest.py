"""The tools are scripts beside each other: put their folder on the path as Python does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
