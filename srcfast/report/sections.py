"""The page's tables, bars and words, one function a section. Whatever comes out of files is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from html import escape
from typing import Any

from srcfast.report import plots
from srcfast.report.run_files import RunFiles

NOT_MEASURED = '<p class="soft">This run did not measure it.</p>'
SAMPLE_STEPS = {
    "samples": "samples",
    "with_two_parsed_distinct": "with two candidates that parse and differ",
    "with_pair": "with a pair to propose",
}
PAIR_STEPS = {
    "pairs_proposed": "pairs proposed",
    "within_margin": "within the score margin",
    "within_confidence": "within the confidence bound",
    "kept": "kept for DPO",
}
RATES = {
    "order_flip_rate": "verdicts that flip with the order",
    "tie_rate": "ties",
    "mean_confidence": "mean confidence of comparisons",
    "mean_kept_confidence": "mean confidence of kept pairs",
    "length_correlation": "correlation of score and length",
}
ADAPTIVE = {
    "pairs_share": "comparisons judged, of all",
    "tokens_share": "tokens run for them, of what all take",
    "same_best": "audited samples with the best candidate that all comparisons give",
    "same_worst": "audited samples with the worst candidate that all comparisons give",
    "same_pair": "audited samples with both",
}
DIVERSITY = {
    "distinct_texts": "distinct texts among a sample's candidates",
    "distinct_answers": "distinct answers among a sample's candidates",
    "bigram_overlap": "token bigrams that two candidates share",
}


def percent(value: float | None) -> str:
    """0.7134 -> 71.3"""
    return "&ndash;" if value is None else f"{100 * value:.1f}"


def with_interval(row: dict[str, Any] | None, key: str) -> str:
    """71.3 [69.0, 73.5], in percent."""
    if row is None or row.get(key) is None:
        return "&ndash;"
    interval = row.get(f"{key}_ci95")
    shown = f" <small>[{percent(interval[0])}, {percent(interval[1])}]</small>" if interval else ""
    return f"{percent(row[key])}{shown}"


def table(
    head: Sequence[str],
    groups: Iterable[Sequence[Sequence[str]]],
    text_columns: Sequence[int] = (0,),
    over: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of cells that are HTML already; a group of rows is ruled off from the next.

    `over`: a row above the head, (label, columns that it spans) each.
    """
    kind = [' class="text"' if column in text_columns else "" for column in range(len(head))]
    html = ["<div class=scroll><table><thead><tr>"]
    if over:
        html += [f"<th colspan={span}{' class=over' if label else ''}>{label}</th>" for label, span in over]
        html.append("</tr><tr>")
    html += [f"<th{kind[column]}>{cell}</th>" for column, cell in enumerate(head)]
    html.append("</tr></thead>")
    for group in groups:
        html.append("<tbody class=group>")
        for row in group:
            html += ["<tr>", *(f"<td{kind[column]}>{cell}</td>" for column, cell in enumerate(row)), "</tr>"]
        html.append("</tbody>")
    return "".join([*html, "</table></div>"])


def bars(rows: Sequence[tuple[str, float, str]], colour: str = "blue") -> str:
    """Horizontal bars: (label, value, what is written behind it)."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    cells = (
        f"<span>{escape(label)}</span>"
        f'<i style="--share:{100 * value / most:.2f}%;--colour:var(--{colour})"></i>'
        f"<span>{shown}</span>"
        for label, value, shown in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def figure(svg: str, caption: str = "") -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def tiles(run: RunFiles) -> str:
    """The headline: accuracy and alignment on the first split, from the first model to the last."""
    if not run.evaluations:
        return ""
    dataset, split = run.splits[0]
    first, last = (run.evaluation(model, dataset, split) for model in (run.models[0], run.models[-1]))
    found = []
    for key, label in (("accuracy", "answers right"), ("alignment", "answers right for a right reason")):
        before, after = ((row or {}).get(key) for row in (first, last))
        if before is None or after is None:
            continue
        gain = f", {100 * (after - before):+.1f} points" if run.models[0] != run.models[-1] else ""
        found.append((f"{percent(before)} &rarr; {percent(after)} <small>%</small>", f"{label}{gain}"))
    kept = sum(funnel.get("kept", 0) for funnel in run.summary.get("funnel", {}).values())
    if kept:
        found.append((f"{kept:,}", "preference pairs learnt from"))
    if run.summary.get("seconds"):
        memory = run.summary.get("peak_rss_bytes")
        peak = f", {memory / 2**30:.2f} GiB at most" if memory else ""
        found.append((duration(run.summary["seconds"]), f"wall-clock time{peak}"))
    html = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in found)
    where = f"{escape(dataset)}, {escape(split)}: {escape(run.models[0])} to {escape(run.models[-1])}"
    return f"<div class=tiles>{html}</div><p class=soft>Accuracy and alignment on {where}.</p>"


def headline(run: RunFiles) -> str:
    """Accuracy and alignment by model and split, with intervals."""
    if not run.evaluations:
        return NOT_MEASURED
    head = ["dataset, split (n)", "model", "accuracy, %", "against<br>base", "aligned, %"]
    head += ["rationale<br>right, %", "right answer,<br>wrong rationale, %", "unparsed"]
    groups = []
    for dataset, split in run.splits:
        rows: list[list[str]] = []
        base = run.evaluation("base", dataset, split)
        for model in run.models:
            row = run.evaluation(model, dataset, split)
            if row is not None:
                rows.append(
                    [
                        "" if rows else f"{escape(dataset)}, {escape(split)} <small>({row['n']:,})</small>",
                        escape(model),
                        with_interval(row, "accuracy"),
                        "" if base is None or row is base else change(row["accuracy"] - base["accuracy"]),
                        with_interval(row, "alignment"),
                        with_interval(row, "rationale_accuracy"),
                        percent(row.get("right_answer_wrong_rationale")),
                        f"{row.get('unparsed', 0):,}",
                    ]
                )
        groups.append(rows)
    return (
        "<p>A sample is <em>aligned</em> if its answer is right, every sentence of its rationale holds, and "
        "the rationale leads to the answer. Brackets: 95 % bootstrap intervals over samples.</p>"
        + table(head, groups, (0, 1))
        + set_aside(run)
    )


def set_aside(run: RunFiles) -> str:
    """How many records were not used, if that was counted."""
    count = run.summary.get("rejected")
    if count is None:
        return ""
    where = ": <code>rejected.jsonl</code> has each with its reason" if count else ""
    return f"<p class=soft>Records set aside as unusable: {count:,}{where}.</p>"


def change(points: float) -> str:
    """+3.2 in green, -1.0 in red."""
    return f'<span class="{"up" if points >= 0 else "down"}">{100 * points:+.1f}</span>'


def method(run: RunFiles) -> str:
    """How the figures were made: said beside every score."""
    evaluation, candidates = run.config.get("evaluation", {}), run.config.get("candidates", {})
    tokens = evaluation.get("max_new_tokens")
    limit = f"at most {tokens} new tokens" if tokens else "to the end token"
    resamples = evaluation.get("bootstrap_resamples")
    searched = f" Candidates: {candidates['num_candidates']} a sample." if "num_candidates" in candidates else ""
    return (
        "<p class=soft>How these figures were made: the question alone in the checkpoint's own chat "
        f"template, without an instruction to reason; greedy decoding, {limit}; images as the checkpoint's "
        "processor prepares them. One parser reads rationale and answer for every model, a bare short "
        "answer included; what it cannot read counts as wrong. Answers are compared after case, articles, "
        "final periods and number words are levelled."
        f"{f' Intervals: {resamples:,} bootstrap resamples.' if resamples else ''}{searched}</p>"
    )


def case_table(run: RunFiles) -> str:
    """The four cases in figures, where they can't be drawn."""
    groups = []
    for dataset, split in run.splits:
        found = [(model, (run.evaluation(model, dataset, split) or {}).get("cases")) for model in run.models]
        groups.append(
            [
                [
                    f"{escape(dataset)}, {escape(split)}",
                    escape(model),
                    *(f"{cases[key]:,}" for key, _, _ in plots.CASES),
                ]
                for model, cases in found
                if cases
            ]
        )
    head = ["dataset, split", "model", *(label for _, label, _ in plots.CASES)]
    return table(head, groups, (0, 1)) if any(groups) else NOT_MEASURED


def abilities(run: RunFiles) -> str:
    """Accuracy and alignment by ability, for splits with more than one."""
    html = []
    for dataset, split in run.splits:
        by_model = {model: (run.evaluation(model, dataset, split) or {}).get("by_ability", {}) for model in run.models}
        models = [model for model in run.models if by_model[model]]
        names = sorted({name for model in models for name in by_model[model]})
        if len(names) < 2:
            continue
        aligned = any(group.get("alignment") is not None for model in models for group in by_model[model].values())
        measures = [("accuracy", "accuracy, %")] + ([("alignment", "aligned, %")] if aligned else [])
        cells = [
            [
                escape(name.replace("_", " ")),
                f"{max(by_model[model].get(name, {}).get('n', 0) for model in models):,}",
            ]
            + [percent(by_model[model].get(name, {}).get(key)) for key, _ in measures for model in models]
            for name in names
        ]
        head = ["ability", "n", *[escape(model) for _ in measures for model in models]]
        over = [("", 2), *((label, len(models)) for _, label in measures)]
        html.append(f"<h3>{escape(dataset)}, {escape(split)}</h3>" + table(head, [cells], over=over))
    return "".join(html) or NOT_MEASURED


def headroom(run: RunFiles) -> str:
    """What the candidates could give, what the R-Scorer finds in them, what the next model keeps of it."""
    rows = run.summary.get("headroom", [])
    if not rows:
        return NOT_MEASURED
    head = ["iteration", "dataset, split", "n", "pass@1", "best of N", "pass@N", "N"]
    head += ["next model's<br>pass@1", "recovered", "scorer agrees<br>with oracle"]
    cells = [
        [
            escape(str(row["iteration"])),
            f"{escape(row['dataset'])}, {escape(row['split'])}",
            f"{row['n']:,}",
            percent(row["pass_at_1"]),
            percent(row["best_of_n"]),
            percent(row["pass_at_n"]),
            f"{row['n_candidates']:.3g}",
            percent(row.get("next_pass_at_1")),
            percent(row.get("recovered")),
            percent(row.get("scorer_oracle_agreement")),
        ]
        for row in rows
    ]
    return (
        "<p>How much better the model could answer with what it can already say: right and aligned by the "
        "oracle, in %. <em>pass@1</em>: the model's own answer before the round. <em>pass@N</em>: some of "
        "its N candidates. <em>best of N</em>: the candidate that the R-Scorer puts first. "
        "<em>Recovered</em>: the share of the way from pass@1 to best of N that the next model's greedy "
        "answers have come. N: candidates a sample, on average.</p>" + table(head, [cells], (0, 1))
    )


def funnel(run: RunFiles) -> str:
    """From samples to kept pairs, why pairs were dropped, and whether the judge can be trusted."""
    funnels = run.summary.get("funnel", {})
    if not funnels:
        return NOT_MEASURED
    html = []
    for name, counts in funnels.items():
        html.append(f"<h3>{escape(name)}</h3>")
        for steps, colour in ((SAMPLE_STEPS, "blue"), (PAIR_STEPS, "green")):
            html.append(
                bars(
                    [(label, counts[key], f"{counts[key]:,}") for key, label in steps.items() if key in counts],
                    colour,
                )
            )
        dropped = {reason.replace("_", " "): n for reason, n in counts.get("dropped", {}).items() if n}
        if dropped:
            listed = ", ".join(f"{escape(reason)} {n:,}" for reason, n in dropped.items())
            html.append(f"<p class=soft>Dropped: {listed}.</p>")
    rates = [
        [label, *(_rate(key, counts.get(key)) for counts in funnels.values())]
        for key, label in RATES.items()
        if any(key in counts for counts in funnels.values())
    ]
    kinds = dict.fromkeys(kind for counts in funnels.values() for kind in counts.get("pair_correctness", {}))
    rates += [
        [
            f"kept pairs with answers {escape(kind.replace('_', ' '))}",
            *(f"{percent(counts.get('pair_correctness', {}).get(kind))} %" for counts in funnels.values()),
        ]
        for kind in kinds
    ]
    shares = run.summary.get("adaptive", {})
    rates += [
        [label, *(f"{percent(shares.get(name, {}).get(key))} %" for name in funnels)]
        for key, label in ADAPTIVE.items()
        if any(key in share for share in shares.values())
    ]
    spreads = run.summary.get("diversity", {})
    rates += [
        [label, *(f"{percent(spreads.get(name, {}).get(key))} %" for name in funnels)]
        for key, label in DIVERSITY.items()
        if any(key in spread for spread in spreads.values())
    ]
    if rates:
        html.append("<h3>The judge and the candidates</h3>" + table(["", *map(escape, funnels)], [rates]))
    return "".join(html)


def last_steps(run: RunFiles) -> str:
    """The training stages in figures: how each ended, over its last tenth of steps."""
    head = [
        "stage",
        "steps",
        "loss",
        "margin",
        "ranked right, %",
        "chosen reward",
        "rejected reward",
        "peak learning rate",
    ]
    rows = []
    for stage in run.training_stages:
        steps = run.training(stage)
        tail = steps[-max(1, len(steps) // 10) :]
        mean = {
            key: sum(found) / len(found)
            for key in ("loss", "margin", "reward_accuracy", "chosen_reward", "rejected_reward")
            if (found := [step[key] for step in tail if step.get(key) is not None])
        }
        accuracy = mean.get("reward_accuracy")
        rows.append(
            [
                escape(stage),
                f"{len(steps):,}",
                f"{mean['loss']:.3f}" if "loss" in mean else "&ndash;",
                f"{mean['margin']:+.3f}" if "margin" in mean else "",
                "" if accuracy is None else percent(accuracy),
                *(f"{mean[key]:+.3f}" if key in mean else "" for key in ("chosen_reward", "rejected_reward")),
                f"{max(step.get('learning_rate') or 0.0 for step in steps):.1e}",
            ]
        )
    return "<p class=soft>Means over the last tenth of each stage's steps.</p>" + table(head, [rows])


def gallery_words(run: RunFiles) -> str:
    """What the marks in the gallery mean."""
    if not run.gallery:
        return ""
    return (
        "<p>Candidates as the R-Scorer judged them: the chosen one in green, the rejected one in red. "
        "Behind a sentence the oracle's word on it, where there is one: &#10003; true, &#10007; false, ? "
        "beyond what is known of the scene.</p>"
    )


def _rate(key: str, value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return (
        f"{value:+.2f}"
        if key == "length_correlation"
        else f"{value:.2f}"
        if "confidence" in key
        else f"{percent(value)} %"
    )


def timings(run: RunFiles) -> str:
    """Wall-clock time and throughput of each stage."""
    stages = run.summary.get("stages", [])
    if not stages:
        return NOT_MEASURED
    rows = []
    for stage in stages:
        speed = stage.get("tokens_per_second")
        rows.append(
            (
                stage["name"],
                stage["seconds"],
                duration(stage["seconds"]) + (f", {speed:,.0f} tokens/s" if speed else ""),
            )
        )
    return bars(rows, "violet")


def duration(seconds: float) -> str:
    """4.2 s, or 0:12:05."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def surroundings(run: RunFiles) -> str:
    """Machine, versions and settings of the run."""
    rows = [
        [escape(key.replace("_", " ")), f"<code>{escape(str(value))}</code>"]
        for key, value in run.environment.items()
        if value
    ]
    rows += [
        [f"<code>{escape(key)}</code>", f"<code>{escape(str(value))}</code>"]
        for key, value in _settings(run.config)
        if value is not None
    ]
    return (
        "<details><summary>Machine, versions and all settings</summary><div class=settings>"
        f"{table(['', ''], [rows], (0, 1))}</div></details>"
    )


def _settings(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [row for key, inner in tree.items() for row in _settings(inner, f"{prefix}.{key}" if prefix else str(key))]


def case_name(case: str) -> str:
    """In words; an unknown one as it stands."""
    return escape({key: label for key, label, _ in plots.CASES}.get(case, case))
