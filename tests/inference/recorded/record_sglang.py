"""Records what our adapter relies on of an SGLang wheel, which cannot be imported without a GPU.

python -m pip download --no-deps sglang==0.5.23 && unzip -q sglang-*.whl -d unpacked
python tests/inference/recorded/record_sglang.py unpacked > tests/inference/recorded/sglang.json
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path


def parameters(file: Path, owner: str | None, function: str) -> list[str]:
    """Names of a function's parameters, in order."""
    tree: ast.AST = ast.parse(file.read_text())
    if owner is not None:
        tree = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = next(n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == function)
    return [argument.arg for argument in [*found.args.args, *found.args.kwonlyargs]]


def fields(file: Path, owner: str | None = None) -> list[str]:
    """Annotated names of one class, or of all classes of a file."""
    classes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ClassDef)]
    return sorted(
        {
            line.target.id
            for c in classes
            if owner in (None, c.name)
            for line in c.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
    )


def architectures(models: dict[str, str]) -> list[str]:
    """Names of ``config.json`` that SGLang serves with these files."""
    entries = [
        re.search(r"^EntryClass = (\[.*?\]|\w+)", text, re.MULTILINE | re.DOTALL)
        for text in models.values()
    ]
    return sorted({name for entry in entries if entry for name in re.findall(r"\w+", entry[1])})


def main(root: Path) -> dict[str, object]:
    srt = root / "sglang" / "srt"
    (about,) = root.glob("sglang-*.dist-info")
    hooks = (srt / "model_executor" / "hook_manager.py").read_text()
    models = {path.stem: path.read_text() for path in (srt / "models").glob("*.py")}
    captures = {
        kind: {n: text for n, text in models.items() if f"def set_{kind}_layers_to_capture" in text}
        for kind in ("dflash", "eagle3")
    }
    return {
        "version": about.name.split("-")[1].removesuffix(".dist"),
        "server_args": sorted(
            {name for file in (srt / "arg_groups" / "fields").glob("*.py") for name in fields(file)}
        ),
        "async_generate": parameters(srt / "entrypoints" / "engine.py", "Engine", "async_generate"),
        "logits_processor": parameters(
            srt / "layers" / "logits_processor.py", "LogitsProcessor", "forward"
        ),
        "final_norm": parameters(
            srt / "layers" / "layer_boundary" / "residual" / "access.py", None, "final_norm_pair"
        ),
        "forward_batch": fields(srt / "model_executor" / "forward_batch_info.py", "ForwardBatch"),
        "hook_spec": sorted(set(re.findall(r'spec\.get\("(\w+)"', hooks))),
        "dflash": architectures(captures["dflash"]),
        "eagle3": architectures(captures["eagle3"]),
        # files whose ids of both conventions mean what follows a layer, not what comes before it
        "counted_from_one": sorted(
            name
            for name, text in (captures["eagle3"] | captures["dflash"]).items()
            if "[val + 1 for val in layer_ids]" in text
        ),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
