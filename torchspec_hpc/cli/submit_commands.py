"""Commands before a job runs: submit, render, plan, preflight, sweep, cost.

Exit codes: 0 done, 1 Slurm does not answer, 2 a mistake of the user, 3 a check failed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec_hpc.cli.arguments import ConfigFile, Json, Overrides, Resume
from torchspec_hpc.cli.output import format_bytes, print_json, print_table

if TYPE_CHECKING:
    from torchspec_hpc.slurm.estimate import Plan

app = typer.Typer()

EXIT_CHECK_FAILED = 3


@app.command()
def submit(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file.")] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    json: Json = False,
    join: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Instead of CONFIG: more engines for a run."),
    ] = None,
) -> None:
    """Submit one Slurm job: engines, trainers, and all between them."""
    from torchspec_hpc.config import RunDir, load_config
    from torchspec_hpc.slurm.submit import submit as submit_run
    from torchspec_hpc.slurm.submit_join import submit_join

    if join is not None:
        changes = [] if config is None else [str(config), *(overrides or ())]
        job = submit_join(RunDir(join), changes)
        if json:
            print_json({"job_id": job, "run": str(join)})
        else:
            print(f"job {job}  joins the run: {join}")
        return
    if config is None:
        raise typer.BadParameter("give a CONFIG, or --join RUN")
    submitted = submit_run(load_config(config, overrides or ()), resume=resume)
    if json:
        print_json(submitted.as_json())
    else:
        print(f"job {submitted.job_id}  run directory: {submitted.run.root}")


@app.command()
def render(config: ConfigFile, overrides: Overrides = None, json: Json = False) -> None:
    """Print the batch script that submit would send, and submit nothing."""
    from torchspec_hpc.config import load_config
    from torchspec_hpc.slurm.prepare import run_directory
    from torchspec_hpc.slurm.render import render_script

    settings = load_config(config, overrides or ())
    run = run_directory(settings)
    script = render_script(settings, run)
    if json:
        print_json({"run": str(run.root), "script": script})
    else:
        print(script, end="")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    json: Json = False,
    ask_slurm: Annotated[bool, typer.Option(help="Ask Slurm for the earliest start.")] = True,
) -> None:
    """Say what a run would take: nodes, memory, disk, hours, and when it might start."""
    from torchspec_hpc.config import load_config
    from torchspec_hpc.errors import TorchspecError
    from torchspec_hpc.slurm.estimate import make_plan
    from torchspec_hpc.slurm.prepare import run_directory
    from torchspec_hpc.slurm.render import render_script
    from torchspec_hpc.slurm.scheduler import check_submission

    settings = load_config(config, overrides or ())
    planned, start = make_plan(settings), None
    if ask_slurm and settings.cluster == "slurm":
        try:
            start = check_submission(render_script(settings, run_directory(settings)))
        except TorchspecError as error:
            planned.warnings.append(str(error))
    if json:
        print_json({**planned.as_json(), "earliest_start": start})
    else:
        _print_plan(planned, start)


@app.command()
def preflight(
    config: ConfigFile,
    overrides: Overrides = None,
    json: Json = False,
    wait: Annotated[
        int, typer.Option(min=0, help="Longest wait for a node, seconds; 0: look at none.")
    ] = 120,
) -> None:
    """Check the configuration, this machine, and one node of each group; 3 if a check fails."""
    from torchspec_hpc.config import load_config
    from torchspec_hpc.slurm.preflight import preflight as check

    settings = load_config(config, [*(overrides or ()), "cluster=slurm"])
    found = []
    for where, finding in check(settings, wait_s=wait):
        found.append((where, finding))
        if not json:  # a node may be long in coming
            print(f"{finding.verdict:4}  {where:9}  {finding.name}: {finding.detail}", flush=True)
    if json:
        print_json([{"where": where, **vars(finding)} for where, finding in found])
    if any(finding.verdict == "fail" for _, finding in found):
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def sweep(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|DIR", help="YAML file; or a sweep.")],
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="An axis; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Default: the configuration's.")] = None,
    in_flight: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 4,
    json: Json = False,
) -> None:
    """Submit a job for each point of a grid, or, for a sweep's directory, print its results."""
    from torchspec_hpc.slurm.sweep import submit_sweep

    if path.is_dir():
        _print_sweep(path, json=json)
        return
    submitted = []
    for trial, job_id in submit_sweep(
        path, overrides or (), grid or [], name or f"{path.stem}-sweep", in_flight
    ):
        submitted.append({"run": trial.name, "job_id": job_id, "overrides": trial.overrides})
        if not json:
            print(f"job {job_id}  {trial.name}  {' '.join(trial.overrides)}", flush=True)
    if json:
        print_json(submitted)


@app.command()
def cost(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file, or a run.")],
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Print the hours that a run has used, or that one attempt of a configuration may use."""
    from torchspec_hpc.config import RunDir, load_config
    from torchspec_hpc.slurm.cost import run_cost
    from torchspec_hpc.slurm.estimate import make_plan

    if path.is_dir():
        values = run_cost(RunDir(path)).as_json()
    else:
        planned = make_plan(load_config(path, overrides or ()))
        values = {
            "num_nodes": sum(part.num_nodes for part in planned.components),
            "num_gpus": planned.num_gpus,
            "node_hours": planned.node_hours,
            "gpu_hours": planned.gpu_hours,
        }
    if json:
        print_json(values)
    else:
        names = [key.replace("_", " ") for key in values]
        print_table({"": names, "value": list(values.values())})


def _print_plan(planned: Plan, start: str | None) -> None:
    parts = planned.as_json()["components"]
    print_table({key.replace("_", " "): [part[key] for part in parts] for key in parts[0]})
    engines = planned.engines
    rows = {
        "engines": f"{engines['num']} of {engines['gpus_each']} devices, "
        f"{engines['per_node']} a node, {engines['nodes']} nodes",
        **{f"memory: {what}": format_bytes(size) for what, size in planned.memory.items()},
        "disk of a checkpoint": format_bytes(planned.checkpoint_bytes),
        "disk of all that are kept": format_bytes(planned.disk_bytes),
        "GPUs": planned.num_gpus,
        "hours of an attempt, at most": planned.time_s / 3600,
    }
    if math.isfinite(planned.time_s):
        rows |= {"node-hours": planned.node_hours, "GPU-hours": planned.gpu_hours}
    rows["earliest start"] = start or "not known"
    print_table({"": list(rows), "estimate": list(rows.values())})
    for warning in planned.warnings:
        print(f"warning: {warning}")


def _print_sweep(folder: Path, *, json: bool) -> None:
    from torchspec_hpc.slurm.sweep import read_sweep

    found = read_sweep(folder)
    rows = [
        {"run": t.name, "overrides": t.overrides, "status": s and s.as_json()} for t, s in found
    ]
    if json:
        print_json(rows)
        return
    keys = [text.partition("=")[0] for text in found[0][0].overrides]
    axes = {
        key: [trial.overrides[i].partition("=")[2] for trial, _ in found]
        for i, key in enumerate(keys)
    }
    shown = ("state", "step", "loss", "accept_len", "best_accept_len")
    status = [s.as_json() if s else {"state": "not submitted"} for _, s in found]
    columns = {key.replace("_", " "): [s.get(key) for s in status] for key in shown}
    print_table({"run": [trial.name for trial, _ in found], **axes, **columns})
