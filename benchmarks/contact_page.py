"""First contact's results on one page: what fell short of its target, what was not measured, then every figure.

`python -m srcfast_benchmarks.contact_page FOLDER` writes the page of a folder's result files again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import write_text
from srcfast_benchmarks.contact_results import read

NAME = "README.md"
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure, and whether it reaches its target; None where it has none. `real`: not of a simulated device."""

    what: str
    value: str
    target: str = ""
    reached: bool | None = None
    real: bool = False


def write_page(folder: Path, parts: Mapping[str, str], skipped: Mapping[str, str]) -> Path:
    """Write the page of the result files in a folder, and return its path.

    Args:
        parts: what each part is about, by name, in order.
        skipped: why a part was not run, by name.
    """
    results = {name: stored for name in parts if (stored := read(folder / f"{name}.json")) is not None}
    write_text(folder / NAME, page(results, parts, skipped))
    return folder / NAME


def page(results: Mapping[str, dict[str, Any]], parts: Mapping[str, str], skipped: Mapping[str, str]) -> str:
    simulated = any(result["simulated"] for result in results.values())
    figures = {
        name: [
            replace(one, target="", reached=None) if simulated and one.real else one for one in figures_of(name, result)
        ]
        for name, result in results.items()
    }
    lines = ["# First contact with a GPU" + (": simulated, so no time or ratio below is a GPU's" if simulated else "")]
    lines += ["", "Written by `python -m srcfast_benchmarks.first_contact` from the files beside it.", ""]
    lines += [*machines(results), "", "## What fell short", ""]
    short = [(name, figure) for name, rows in figures.items() for figure in rows if figure.reached is False]
    lines += (
        ["| part | what | measured | target |", "| --- | --- | --- | --- |"]
        if short
        else ["Nothing that was measured."]
    )
    lines += [f"| {name} | {figure.what} | {figure.value} | {figure.target} |" for name, figure in short]
    lines += ["", "## What was not measured", ""]
    lines += [f"- {one}" for one in not_measured(results, parts, skipped)] or ["All was measured."]
    for name, result in results.items():
        lines += ["", f"## {parts[name]}", "", f"`{name}.json`, {result.get('seconds', 0.0):.0f} s.", ""]
        lines += table(figures[name]) + slowest_kernels(result)
    return "\n".join(lines).rstrip() + "\n"


def machines(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line for each distinct machine and commit."""
    lines: dict[str, None] = {}
    for result in results.values():
        machine = result.get("machine", {})
        versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        lines[
            f"- {machine.get('gpu')}, {machine.get('gpu_bytes', 0) / 2**30:.0f} GiB, driver {machine.get('driver')}, CUDA "
            f"{machine.get('cuda')}; {machine.get('cpus')} cores of {machine.get('cpu')}; Python {machine.get('python')}, torch "
            f"{machine.get('torch')}, {versions}; attention: {', '.join(machine.get('attention_backends', []))}; native library: "
            f"{machine.get('native_library')}; commit {result['commit']}, sources {result['sources']}; {result['shapes']} "
            f"shapes; {result['started'][:10]}."
        ] = None
    return list(lines)


def not_measured(
    results: Mapping[str, dict[str, Any]], parts: Mapping[str, str], skipped: Mapping[str, str]
) -> Iterator[str]:
    """Parts and cases without a result, and why."""
    for name in parts:
        if name in skipped or name not in results:
            yield f"{name}: {skipped.get(name, 'not run')}"
        result = results.get(name, {"cases": {}, "planned": ["a case"]})
        for case, values in result["cases"].items():
            if values["status"] != "done":
                why = values.get("error") or values.get("why") or values.get("stopped") or "it was stopped"
                yield f"{name}, {case}: {values['status'].replace('_', ' ')}: {one_line(why)}"
        if left := [case for case in result.get("left", []) if case not in result["cases"]]:
            yield f"{name}: no time for {'; '.join(left)}"
        if not result.get("planned"):
            output = "".join(process.get("output", "") for process in result["processes"][-1:])
            yield f"{name}: no case began: {one_line(output[-300:])}"


def table(figures: list[Figure]) -> list[str]:
    if not figures:
        return ["No figure."]
    words = {True: "reached", False: "**short**", None: ""}
    lines = ["| what | measured | target | |", "| --- | --- | --- | --- |"]
    return lines + [f"| {one.what} | {one.value} | {one.target} | {words[one.reached]} |" for one in figures]


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def slowest_kernels(result: dict[str, Any]) -> list[str]:
    """Where the time went in the profiled case with most tokens."""
    profiled = {name: case for name, case in result["cases"].items() if case.get("profile")}
    if not profiled:
        return []
    name = max(profiled, key=lambda one: profiled[one].get("tokens", 0))
    profile = profiled[name]["profile"]
    shares = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in profile["shares"].items())
    lines = ["", f"{name}, profiled: {1000 * profile['seconds']:.1f} ms: {shares}.", ""]
    lines += ["| ms | calls | kernel |", "| --- | --- | --- |"]
    return lines + [f"| {one['ms']:.2f} | {one['calls']} | `{one_line(one['name'])}` |" for one in profile["kernels"]]


# Figures and their targets ----------------------------------------------------------------------------------


def figures_of(name: str, result: dict[str, Any]) -> Iterator[Figure]:
    """The figures of a part's cases; a case that failed or was killed falls short of a result."""
    for case, values in result["cases"].items():
        if name in FIGURES:
            yield from FIGURES[name](case, values, result["cases"])
        if values["status"] in ("failed", "killed"):
            yield Figure(case, one_line(values.get("error", "killed")), "a result", False)


def at_least(what: str, value: float, target: float, form: str = ".2f") -> Figure:
    return Figure(what, f"{value:{form}}", f"at least {target:{form}}", value >= target, True)


def at_most(what: str, value: float, target: float, form: str = ".2f") -> Figure:
    return Figure(what, f"{value:{form}}", f"at most {target:{form}}", value <= target, True)


def near_forecast(case: str, ratio: float) -> Figure:
    return Figure(f"{case}: peak allocated / forecast", f"{ratio:.3f}", "0.90 to 1.10", 0.9 <= ratio <= 1.1, True)


def busy(what: str, profile: Mapping[str, Any]) -> Figure:
    return (
        at_least(what, profile["busy"], 0.90)
        if profile["device"]
        else Figure(what, "unknown: the profiler saw no kernel")
    )


def demo(case: str, values: Case, _: Any) -> Iterator[Figure]:
    """Complete, faster than the committed run on a CPU, and as accurate."""
    if values["status"] != "done":
        stages = ", ".join(stage["name"] for stage in values.get("stages", []))
        yield Figure("stages that finished", stages or "none", "all", False)
        return
    yield Figure("calibrate", "complete", "complete", True)
    cpu = values["on_a_cpu"]
    if cpu is None:
        return
    yield at_most("wall clock / that of 2 CPU threads in fp32", values["wall_seconds"] / cpu["wall_seconds"], 1.0)
    others = {(row["model"], row["dataset"], row["split"]): row for row in cpu["evaluations"]}
    for row in values["evaluations"]:
        other = others.get((row["model"], row["dataset"], row["split"]))
        if other is not None:
            what = f"{row['model']}, {row['dataset']} {row['split']}: accuracy - the CPU's in fp32"
            low, high = other["accuracy_ci95"]
            value, apart = row["accuracy"], row["accuracy"] - other["accuracy"]
            yield Figure(what, f"{apart:+.3f}", "within the CPU's 95 % interval", low <= value <= high)


def gpu_tests(case: str, values: Case, _: Any) -> Iterator[Figure]:
    counts, collected = values.get("counts", {}), values.get("collected", 0)
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    text = f"{passed} of {collected} passed" + (f", {skipped} skipped" if skipped else "")
    yield Figure(case, text, "all", collected > 0 and passed + skipped == collected)
    for failure in values.get("failures", []):
        last = (failure["message"].strip().splitlines() or [""])[-1]
        yield Figure(failure["id"], f"{failure['outcome']}: {one_line(last)[:160]}", "passed", False)


def dpo_steps(case: str, values: Case, cases: Mapping[str, Case]) -> Iterator[Figure]:
    if "mfu" not in values:
        return
    mfu = at_least(f"{case}: MFU", values["mfu"], 0.40)
    yield mfu if values["tokens"] >= 4000 else Figure(mfu.what, mfu.value)
    yield Figure(f"{case}: ms a step", f"{values['ms_a_step']:.1f}")
    yield Figure(f"{case}: pairs a second", f"{values['pairs_per_second']:.1f}")
    yield near_forecast(case, values["allocated_over_forecast"])
    yield at_most(f"{case}: peak reserved / allocated", values["reserved_over_allocated"], 1.10)
    yield busy(f"{case}: share of a step in which the device works", values["profile"])
    if (drift := values["first_step"].get("max_drift")) is not None:
        words = f"{case}: largest drift in the first step, nats a root token"
        yield at_most(words, drift, values["most_drift"], ".4f")
    whole = cases.get(case.replace("nf4", "none"), {})
    if case.startswith("nf4") and "ms_a_step" in whole:
        yield at_most(f"{case}: ms a step / that of whole weights", values["ms_a_step"] / whole["ms_a_step"], 1.25)


def beam_search(case: str, values: Case, cases: Mapping[str, Case]) -> Iterator[Figure]:
    if values["status"] != "done":
        return
    yield near_forecast(case, values["allocated_over_forecast"])
    yield at_most(f"{case}: GiB held after two pieces", values["left_gib"], 0.05)
    yield at_most(f"{case}: GiB that the second piece adds", values["second_over_first_gib"], 0.01)
    yield Figure(f"{case}: tokens a second", f"{values['tokens_per_second']:,.0f}")
    if "ms_a_step" not in values:
        return
    yield Figure(f"{case}: ms a step", f"{values['ms_a_step']:.2f}")
    if "no graphs" in case:
        return
    if values["least_ms_a_step"] is not None:
        ratio = values["ms_a_step"] / values["least_ms_a_step"]
        yield at_most(f"{case}: ms a step / the least that memory and products allow", ratio, 2.0)
    plain = cases.get(case.replace("graphs", "no graphs"), {})
    if "ms_a_step" in plain:
        yield at_least(f"{case}: times as fast as without", plain["ms_a_step"] / values["ms_a_step"], 1.0)


def drift(case: str, values: Case, _: Any) -> Iterator[Figure]:
    for key, words in (("packings", "alone and packed"), ("decoding", "decoding and training")):
        if key in values:
            apart = values[key]
            for of, what in (("root_mean_square_drift", "root mean square"), ("largest_drift", "largest")):
                most = apart[f"most_{of.removeprefix('largest_')}"]
                yield at_most(f"{case}: {words}: {what} drift, nats a root token", apart[of], most, ".4f")


def judging(case: str, values: Case, _: Any) -> Iterator[Figure]:
    if values["status"] == "done":
        yield busy(f"{case}: share of the wall clock in which the device works", values["profile"])
        yield at_least(f"{case}: MFU", values["mfu"], 0.30)
        yield Figure(f"{case}: ms a forest of {values['tokens']:,.0f} tokens", f"{values['ms_a_forest']:.1f}")


def kernels(case: str, values: Case, _: Any) -> Iterator[Figure]:
    """Yield srcfast's time relative to each other implementation's, forward and backward together where there is a backward."""
    implementations = values.get("ways", {})  # the key in stored results
    taken = {
        impl: list(one["times"].values())[-1]["milliseconds"] for impl, one in implementations.items() if "times" in one
    }
    if "srcfast" in taken:
        shape = ", ".join(f"{key} {value}" for key, value in values["shape"].items())
        yield Figure(f"{case}, {shape}: ms", f"{taken['srcfast']:.3f}")
    for impl, milliseconds in taken.items():
        if impl.startswith("srcfast") or "srcfast" not in taken:
            continue
        ratio, limit = taken["srcfast"] / milliseconds, impl in values["limits"]
        what = f"{case}: time / that of {impl}" + (" (a bound)" if limit else "")
        if limit and case != "linear_logprob":
            yield Figure(what, f"{ratio:.2f}")
        else:
            yield at_most(what, ratio, 1.15 if limit else 1.0)
    yield from (
        Figure(f"{case}: {impl}", one_line(one["failed"])) for impl, one in implementations.items() if "failed" in one
    )


def peers(case: str, values: Case, cases: Mapping[str, Case]) -> Iterator[Figure]:
    quantize, _, impl = case.partition(", ")
    other = cases.get(f"{quantize}, TRL", {})
    if "pairs_per_second" not in values:
        return
    yield Figure(f"{case}: pairs a second", f"{values['pairs_per_second']:.2f}")
    if impl != "TRL" and "pairs_per_second" in other:
        ratio = values["pairs_per_second"] / other["pairs_per_second"]
        yield at_least(f"{case}: times as fast as TRL", ratio, 2.0 if "computed" in impl else 3.0)
        memory = values["extra_mebibytes"] / max(1.0, other["extra_mebibytes"])
        yield at_most(f"{case}: extra memory / TRL's", memory, 1.0)


FIGURES: dict[str, Callable[[str, Case, Mapping[str, Case]], Iterator[Figure]]] = {
    "demo": demo,
    "gpu_tests": gpu_tests,
    "dpo_steps": dpo_steps,
    "beam_search": beam_search,
    "drift": drift,
    "judging": judging,
    "kernels": kernels,
    "peers": peers,
}

if __name__ == "__main__":
    from srcfast_benchmarks.first_contact import PARTS

    print(write_page(Path(sys.argv[1]), {part.name: part.about for part in PARTS}, {}))
