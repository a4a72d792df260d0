"""Run the arms of a study under each seed, as one work list that several processes share and that a stop does not lose.

An arm under a seed is a calibration in a directory of its own. The stages that it has in common with another arm under the same
seed are taken over from there. Processes on this or other machines that are started with the same file take items
that no other process works on; under torchrun all ranks of a process work on one item.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from srcfast import distributed
from srcfast.calibrate import calibrate
from srcfast.config.load import load_config
from srcfast.errors import SrcfastError
from srcfast.run.directory import RunDirectory
from srcfast.run.lock import lock_directory
from srcfast.run.shared_stages import common_stages, share_stages
from srcfast.study.settings import Study

Item = tuple[str, int]  # arm and seed
WAIT = 5.0  # seconds between looks for an item while other processes work on all that are left
DONE = -1


def run_study(study: Study, quiet: bool, report: Callable[[str], None]) -> None:
    """Run what is unfinished of a study; return when all arms are finished.

    Args:
        study: the work list.
        quiet: whether the calibrations show no progress.
        report: called with a line about each item that begins.
    """
    items = [(arm, seed) for seed in range(study.settings.seeds) for arm in study.settings.arms]
    unfinished = list(range(len(items)))  # by rank 0, which claims for all
    while True:
        with ExitStack() as claim:
            index = distributed.run_on_rank_zero(partial(_claim, study, items, unfinished, claim))
            if index == DONE:
                return
            if index is None:
                continue
            arm, seed = items[index]
            config = study.configs[arm, seed].replace(quiet=quiet)
            taken = distributed.run_on_rank_zero(partial(_take_over, study, items[index]))
            if distributed.is_rank_zero():
                report(f"{arm}, seed {seed} ({index + 1} of {len(items)}): {len(taken)} stages taken over")
            calibrate(config)


def is_finished(study: Study, item: Item) -> bool:
    """Return whether an arm under a seed has run to its end with these settings."""
    config = study.configs[item]
    if not (config.run_path / "summary.json").is_file():
        return False
    stored = load_config(config.run_path / "config.yaml").replace(quiet=config.quiet)
    # A summary may be of fewer rounds than the settings ask for now.
    last = f"iteration-{config.iterations}" if config.iterations else "rationale"
    return stored.identity() == config.identity() and f"{last}/evaluation" in RunDirectory(config.run_path).manifest()


def _claim(study: Study, items: list[Item], unfinished: list[int], claim: ExitStack) -> int | None:
    """Lock an unfinished item for this process and return its index; DONE where all are finished, None after a wait.

    An arm that shares stages with an arm which is being run waits for it. What has been finished leaves `unfinished`.
    """
    unfinished[:] = [index for index in unfinished if not is_finished(study, items[index])]
    if not unfinished:
        return DONE
    busy: list[Item] = []
    for index in unfinished:
        item = items[index]
        try:
            claim.enter_context(lock_directory(study.settings.path / "claims" / f"{item[0]}-{item[1]}"))
        except SrcfastError:
            busy.append(item)
            continue
        if not any(_waits_for(study, item, other) for other in busy) and not is_finished(study, item):
            return index
        claim.close()
    time.sleep(WAIT)
    return None


def _waits_for(study: Study, item: Item, other: Item) -> bool:
    """Return whether an item would repeat a stage that another one, which is being run, has not finished yet."""
    if item[1] != other[1]:
        return False
    mine, theirs = (study.configs[each].identity() for each in (item, other))
    if any(mine[name] != theirs[name] for name in ("seed", "model", "data", "lora", "rationale")):
        return False
    done = RunDirectory(study.configs[other].run_path).manifest()
    shared = ["rationale"]
    if mine["iterations"] and theirs["iterations"] and mine["candidates"] == theirs["candidates"]:
        shared.append("iteration-1/candidates")
        if mine["scorer"] == theirs["scorer"]:
            shared.append("iteration-1/scores")
    return any(name not in done for name in shared)


def _take_over(study: Study, item: Item) -> list[str]:
    """Share with an item the stages of the arm under the same seed that has most of them; return their names."""
    config = study.configs[item]
    settings = config.identity()
    others = [
        RunDirectory(study.configs[arm, item[1]].run_path)
        for arm in study.settings.arms
        if arm != item[0] and study.configs[arm, item[1]].run_path.is_dir()
    ]
    if not others:
        return []
    best = max(others, key=lambda directory: len(common_stages(directory, settings)))
    return share_stages(best, RunDirectory(config.run_path), settings)
