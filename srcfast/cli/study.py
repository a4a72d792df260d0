"""The command `study`: run the arms of a study, then write its summary and tables."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from rich.console import Console

from srcfast import distributed
from srcfast.cli.table import table
from srcfast.data.jsonl import check_writable, write_json, write_text
from srcfast.hub.pins import pinned
from srcfast.study.page import write_page
from srcfast.study.results import CAPTIONS, arms_table, differences_table, markdown, summarise
from srcfast.study.settings import read_study
from srcfast.study.work_list import run_study


def study(file: Path, output: Path | None, quiet: bool) -> None:
    """Run what is unfinished of a study, then write `summary.json`, tables and a page to `output`, by default its directory."""
    plan = read_study(file)
    directory = plan.settings.path if output is None else output
    names = {name: directory / name for name in ("summary.json", "tables.md", "index.html")}
    for path in names.values():
        check_writable(path, is_file=True)
    config = next(iter(plan.configs.values()))
    with distributed.process_group(timedelta(seconds=config.distributed.timeout_seconds), config.model.device):
        for item, settings in plan.configs.items():  # once for all arms and seeds: a branch may move meanwhile
            plan.configs[item] = pinned(
                settings, plan.settings.path, models=("model", "scorer"), data=("train", "evaluation")
            )
        run_study(plan, quiet or not distributed.is_rank_zero(), Console(stderr=True).print)
        if not distributed.is_rank_zero():
            return
        summary = summarise(plan)
    write_json(names["summary.json"], summary)
    tables = [arms_table(summary), differences_table(summary)]
    texts = [
        CAPTIONS[0],
        markdown(tables[0]),
        CAPTIONS[1] if tables[1] else "",
        markdown(tables[1]),
    ]
    write_text(names["tables.md"], "\n\n".join(text for text in texts if text) + "\n")
    write_page(plan, summary, names["index.html"])
    if not quiet:
        for title, rows in zip(("% right / % aligned (95 % interval)", "points"), tables, strict=True):
            if rows:
                table(title, rows, header=True)
    print(f"page: {names['index.html']}")
