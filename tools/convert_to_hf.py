#!/usr/bin/env python3
"""``torchspec-hpc export`` under the name and with the options of the reference system's tool.

    python tools/convert_to_hf.py --input-dir RUN/checkpoints/step_5000
    python tools/convert_to_hf.py --input-dir RUN --prune-vocab --draft-vocab-size 32000

What --prune-vocab counts is the run's own training data, tokenizer and cache unless they are given.
Options that have nothing to decide here are accepted and said to be without effect.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from torchspec_hpc.cli.export_command import coverage_table
from torchspec_hpc.errors import TorchspecError, UserError, exit_code_of
from torchspec_hpc.export.request import (
    DataRequest,
    ExportRequest,
    analyze_vocabulary,
    run_export,
)

logger = logging.getLogger("convert_to_hf")

WITHOUT_EFFECT = {
    "config": "the checkpoint holds the draft's shape",
    "embedding_key": "no embedding is written: engines share the target's",
    "trust_remote_code": "no code of the target runs",
    "vllm": "the hf format is served by vLLM and SGLang both",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input-dir", type=Path, required=True, help="run or checkpoint")
    add("--output-dir", type=Path, help="default: INPUT_DIR_hf")
    add("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    add("--format", choices=["hf", "speculators"], default="hf")
    add("-f", "--force", action="store_true", help="replace an earlier export")
    add("--target-model-path", help="the target's name for the card; default: as trained")
    add("--config", help="without effect")
    add("--embedding-key", help="without effect")
    add("--trust-remote-code", action="store_true", help="without effect")
    add("--vllm", action="store_true", help="without effect")
    vocabulary = parser.add_argument_group("draft vocabulary")
    add = vocabulary.add_argument
    add("--analyze-vocab", action="store_true", help="print the coverage by size, and end")
    add("--prune-vocab", action="store_true", help="keep the most frequent tokens of the data")
    add("--draft-vocab-size", type=int, help="tokens to keep")
    add("--dataset-path", type=Path, help="default: the run's training data")
    add("--tokenizer", help="default: the run's target")
    add("--chat-template", help="default: the run's")
    add("--prompt-key", help="default: the run's")
    add("--max-seq-length", type=int, help="default: the run's")
    add("--cache-dir", type=Path, help="of tokenized data; default: the run's")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    """Does what was asked for.

    Raises:
        UserError: It cannot be done.
    """
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(options, name):
            logger.warning("--%s has no effect: %s", name.replace("_", "-"), reason)
    data = DataRequest(
        dataset_path=options.dataset_path,
        tokenizer=options.tokenizer,
        chat_template=options.chat_template,
        prompt_key=options.prompt_key,
        max_seq_length=options.max_seq_length,
        cache_dir=options.cache_dir,
    )
    if options.analyze_vocab:
        Console().print(coverage_table(analyze_vocabulary(options.input_dir, data)))
        return
    if options.prune_vocab != (options.draft_vocab_size is not None):
        raise UserError("--prune-vocab and --draft-vocab-size go together")
    source = options.input_dir.absolute()
    request = ExportRequest(
        source=source,
        output=options.output_dir or source.with_name(source.name + "_hf"),
        draft_format=options.format,
        dtype=options.dtype,
        target=options.target_model_path,
        draft_vocab_size=options.draft_vocab_size,
        data=data,
        replace=options.force,
    )
    print(run_export(request))


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s")
    try:
        convert(parse(arguments))
    except TorchspecError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
