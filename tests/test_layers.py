"""The folder tree is the architecture: imports go downwards only, the login node needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "torchspec_hpc"

# A package may import from packages of a lower level, and from itself.
LEVEL = {
    "errors": 0,
    "config": 1,
    "observe": 1,
    "transfer": 2,
    "drafts": 2,
    "data": 2,
    "target": 2,
    "slurm": 3,
    "inference": 3,
    "training": 3,
    "export": 3,
    "cli": 4,
}
# Within one level only these may be used by their neighbours, in this direction.
ALLOWED_SIDEWAYS = {("observe", "config"), ("drafts", "target"), ("data", "target")}


def imports_of(path: Path) -> set[str]:
    """Our own packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "torchspec_hpc":
                names = [f"torchspec_hpc.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("torchspec_hpc.")}
    return found - {"__version__"}


def test_every_package_has_a_level() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(LEVEL) - {"errors"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if package == "__init__":
        assert not imports_of(path)
        return
    for used in imports_of(path) - {package}:
        downwards = LEVEL[used] < LEVEL[package]
        assert downwards or (package, used) in ALLOWED_SIDEWAYS, f"{package} imports {used}"


@pytest.mark.parametrize(
    "module",
    [
        "cli.main",
        "cli.progress",
        "config",
        "config.endpoints",
        "target.spec",
        *[f"slurm.{p.stem}" for p in sorted((ROOT / "slurm").glob("*.py")) if p.stem != "__init__"],
    ],
)
def test_login_node_modules_do_not_import_torch(module: str) -> None:
    code = (
        f"import sys, torchspec_hpc.{module}\n"
        "heavy = {'torch', 'transformers', 'vllm', 'mooncake', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
