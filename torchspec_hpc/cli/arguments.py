"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.learning_rate=5e-5."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
RunPaths = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run directories, or one that holds runs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Resume = Annotated[bool, typer.Option(help="Go on with a run that exists.")]
