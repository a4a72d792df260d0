"""First contact loses nothing to parts that fail, hang or die, nor to a time that is over; and all of it runs, simulated."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda

from srcfast_benchmarks import contact_page, contact_pytest, contact_suite, first_contact
from srcfast_benchmarks.contact_part import Case
from srcfast_benchmarks.contact_results import Context, Result, commit_of, plain, read
from srcfast_benchmarks.first_contact import PARTS, Part, Run

ROOT = Path(first_contact.__file__).resolve().parents[1]
MACHINE = {"gpu": "made up", "driver": "1", "torch": "2"}
CASE_LIMIT = 10.0  # seconds; the cases below but one end at once


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a part's module from the source of its cases, and gives the part."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(Run, "machine", lambda run: MACHINE)
    monkeypatch.setattr(first_contact, "sources_hash", lambda: "same")

    def write(source: str, name: str = "made_up") -> Part:
        text = "import os, time\nfrom srcfast_benchmarks import contact_part\n" + textwrap.dedent(source)
        (tmp_path / f"{name}_part.py").write_text(text, encoding="utf-8")
        part = Part(name, f"{name}_part", "made up", limit=300.0, case_limit=CASE_LIMIT, least=1.0)
        monkeypatch.setattr(first_contact, "PARTS", (part,))
        return part

    return write


def run(output: Path, *parts: Part, minutes: float = 20.0) -> dict[str, Any]:
    """The result file of the last part."""
    assert Run(output, minutes, "tiny", False, "abc").run(list(parts)) == 0
    result = read(output / f"{parts[-1].name}.json")
    return {} if result is None else result


CASES = """
def cases(context):
    return {"good": good, "bad": bad, "missing": missing, "dies": dies, "hangs": hangs, "last": good}
def good(case):
    case.store(before=float("nan"))
    return {"value": 2.0}
def bad(case):
    raise ValueError("no such luck")
def missing(case):
    raise contact_part.LeftOut("no such package")
def dies(case):
    print("about to die", flush=True)
    os.abort()
def hangs(case):
    case.store(half=1)
    time.sleep(1000)
"""


def test_no_case_ends_another(made_up: Any, tmp_path: Path) -> None:
    result = run(tmp_path / "results", made_up(CASES))
    cases = result["cases"]
    assert {name: case["status"] for name, case in cases.items()} == {
        "good": "done",
        "bad": "failed",
        "missing": "left_out",
        "dies": "killed",
        "hangs": "killed",
        "last": "done",
    }
    assert result["status"] == "complete" and result["left"] == []
    assert cases["good"]["value"] == 2.0 and cases["good"]["before"] == "nan"
    assert cases["bad"]["error"] == "ValueError: no such luck" and "in bad" in cases["bad"]["traceback"]
    assert cases["missing"]["why"] == "LeftOut: no such package"
    assert "exit status -6" in cases["dies"]["error"] and "about to die" in cases["dies"]["output"]
    assert "no result within 10 s" in cases["hangs"]["error"] and cases["hangs"]["half"] == 1
    assert "in hangs" in cases["hangs"]["output"]  # where it was
    assert [process["exit"] for process in result["processes"]] == [-6, -6, 0]
    assert result["machine"] == MACHINE and result["commit"] == "abc"
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "ValueError: no such luck" in page and "killed" in page and "left out" in page


def test_what_is_complete_is_not_run_again_unless_the_sources_change(
    made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = made_up(
        """
        def cases(context):
            return {"one": count}
        def count(case):
            with open(os.environ["COUNTED"], "a") as file:
                file.write("x")
            return {}
        """
    )
    counted = tmp_path / "counted"
    monkeypatch.setenv("COUNTED", str(counted))
    for _ in range(2):
        assert run(tmp_path / "results", part)["status"] == "complete"
    assert counted.read_text() == "x"
    monkeypatch.setattr(first_contact, "sources_hash", lambda: "changed")
    assert run(tmp_path / "results", part)["sources"] == "changed"
    assert counted.read_text() == "xx"


def test_a_part_that_was_stopped_goes_on_with_the_cases_that_are_left(
    made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = made_up(
        """
        def cases(context):
            return {"first": first, "second": second, "third": first}
        def first(case):
            return {"process": os.getpid()}
        def second(case):
            case.store(began=True)
            while "GO_ON" not in os.environ:
                time.sleep(0.1)
            return first(case)
        """
    )
    stopped = run(tmp_path / "results", replace(part, limit=CASE_LIMIT, case_limit=300.0))
    assert stopped["status"] == "partial" and stopped["left"] == ["second", "third"]
    assert stopped["cases"]["second"]["stopped"] == "the part's time was over" and stopped["cases"]["second"]["began"]
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert "made_up, second: under way: the part's time was over" in page and "made_up: no time for third" in page
    monkeypatch.setenv("GO_ON", "1")
    whole = run(tmp_path / "results", part)
    assert whole["status"] == "complete"
    assert whole["cases"]["first"] == stopped["cases"]["first"]
    assert whole["cases"]["second"]["process"] == whole["cases"]["third"]["process"]
    assert "stopped" not in whole["cases"]["second"]


def test_a_process_that_has_lost_the_device_is_followed_by_another(made_up: Any, tmp_path: Path) -> None:
    result = run(
        tmp_path / "results",
        made_up(
            """
            contact_part.answers = lambda: False
            def cases(context):
                return {"bad": bad, "good": good}
            def bad(case):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            def good(case):
                return {"process": os.getpid()}
            """
        ),
    )
    assert {name: case["status"] for name, case in result["cases"].items()} == {"bad": "failed", "good": "done"}
    assert [process["exit"] for process in result["processes"]] == [75, 0]


def test_a_part_that_cannot_even_be_imported_is_stored_with_its_output(made_up: Any, tmp_path: Path) -> None:
    result = run(tmp_path / "results", made_up("import no_such_package"))
    assert result["status"] == "partial" and result["cases"] == {} and len(result["processes"]) == 1
    assert "No module named 'no_such_package'" in result["processes"][0]["output"]
    assert "made_up: no case began" in (tmp_path / "results" / "README.md").read_text(encoding="utf-8")


def test_a_run_that_is_terminated_leaves_no_process_and_a_page(made_up: Any, tmp_path: Path) -> None:
    made_up(
        """
        import subprocess
        def cases(context):
            return {"waits": waits}
        def waits(case):
            case.store(process=os.getpid(), started=subprocess.Popen(["sleep", "1000"]).pid)
            time.sleep(1000)
        """
    )
    code = (
        "import sys; from srcfast_benchmarks import first_contact as f\n"
        "f.PARTS = (f.Part('made_up', 'made_up_part', 'made up', 900.0, 900.0),)\n"
        "f.Run.machine = lambda run: {'gpu': 'made up', 'driver': '1', 'torch': '2'}\n"
        f"sys.exit(f.main(['--output', {str(tmp_path / 'results')!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        try:
            case: dict[str, Any] = {}
            while "started" not in case:
                assert process.poll() is None
                time.sleep(0.1)
                case = (read(tmp_path / "results" / "made_up.json") or {"cases": {}})["cases"].get("waits", {})
            process.terminate()
            assert process.wait() == 128 + 15
        finally:
            process.kill()
    for number in (case["process"], case["started"]):
        assert not running(number)
    assert "made_up, waits: under way" in (tmp_path / "results" / "README.md").read_text(encoding="utf-8")


def running(number: int) -> bool:
    """Whether a process exists and is not only waiting for its parent to ask for its status."""
    status = Path(f"/proc/{number}/status")
    return status.is_file() and "State:\tZ" not in status.read_text(encoding="ascii")


def test_parts_without_time_are_skipped_by_name(made_up: Any, tmp_path: Path) -> None:
    part = replace(made_up("def cases(context):\n    return {}\n"), least=1e6)
    assert run(tmp_path / "results", part) == {}
    assert "made_up: skipped: " in (tmp_path / "results" / "README.md").read_text(encoding="utf-8")


def test_without_a_device_nothing_is_run(made_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = made_up(CASES)
    monkeypatch.setattr(Run, "machine", lambda run: {"gpu": None, "torch": "2"})
    assert Run(tmp_path / "results", 1.0, "full", False, None).run([part]) == 1
    assert not (tmp_path / "results").exists()


def test_real_and_simulated_results_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Result(tmp_path / "demo.json", {"part": "demo", "simulated": False}).write()
    for words in (["--simulated", "--output", str(tmp_path)], ["--simulated", "--output", str(first_contact.REAL)]):
        with pytest.raises(SystemExit):
            first_contact.main(words)
        assert re.search(r"expected a folder (without real|outside of benchmarks)", capsys.readouterr().err)
    Result(tmp_path / "other" / "demo.json", {"part": "demo", "simulated": True}).write()
    with pytest.raises(SystemExit):
        first_contact.main(["--output", str(tmp_path / "other")])
    assert "without simulated results" in capsys.readouterr().err


def test_the_process_that_watches_needs_nothing_that_may_be_broken() -> None:
    """It imports neither torch nor what is installed from a registry, so that it can store why others can't."""
    code = (
        "import sys; from srcfast_benchmarks import first_contact\n"
        "ours = {'srcfast', 'srcfast_benchmarks', '__main__', 'sitecustomize', 'usercustomize'}\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(root for root in roots - ours - set(sys.stdlib_module_names) if not root.startswith('_')))"
    )
    before = "import sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    imported, plain_start = (
        json.loads(subprocess.check_output([sys.executable, "-c", text], text=True).replace("'", '"'))
        for text in (code, before)
    )
    assert set(imported) <= set(plain_start)  # what an installation's .pth files import into every process


JUDGED = {
    "status": "done",
    "mfu": 0.25,
    "tokens": 40000,
    "ms_a_forest": 100.0,
    "profile": {"seconds": 0.1, "device": True, "busy": 0.95, "shares": {"gemm": 0.95, "host": 0.05}, "kernels": []},
}


@pytest.mark.parametrize("simulated", [False, True])
def test_the_page_begins_with_what_fell_short(simulated: bool) -> None:
    """Of a simulated device no time or ratio can fall short, but a failure can."""
    head = {
        "part": "judging",
        "simulated": simulated,
        "shapes": "full",
        "commit": "abc",
        "sources": "def",
        "planned": ["a", "b"],
    }
    cases = {"a": JUDGED, "b": {"status": "failed", "error": "RuntimeError: | CUDA error"}}
    result = head | {
        "machine": MACHINE,
        "started": "2026-01-01T00:00:00",
        "cases": cases,
        "processes": [],
        "seconds": 12.0,
    }
    text = contact_page.page(
        {"judging": result}, {"judging": "About judging", "peers": "About peers"}, {"peers": "skipped: no time"}
    )
    short, _, rest = text.partition("## What was not measured")
    assert "| judging | b | RuntimeError: / CUDA error | a result |" in short
    assert ("| judging | a: MFU | 0.25 | at least 0.30 |" in short) == (not simulated)
    assert "- judging, b: failed: RuntimeError" in rest and "- peers: skipped: no time" in rest
    assert "0.95 | at least 0.90 | reached" in rest or simulated
    assert "## About judging" in rest and "## About peers" not in rest
    assert ("simulated" in text.splitlines()[0]) == simulated


def test_numbers_that_json_cannot_hold_are_named() -> None:
    import numpy as np

    values = {"a": float("inf"), "b": [np.float32(1.5), np.int64(3)], 4: Path("x")}
    assert plain(values) == {"a": "inf", "b": [1.5, 3], "4": "x"}


# Tests of a GPU ---------------------------------------------------------------------------------------------


SUITE = """
import os, signal, pytest, torch
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_crashes(): os.kill(os.getpid(), signal.SIGKILL)
def test_loses_the_device(monkeypatch):
    from srcfast_benchmarks import contact_pytest
    contact_pytest.why_lost = lambda: "an illegal memory access"
    assert False
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_passes_too(): pass
@pytest.mark.timing
def test_times(): pass
"""


def test_no_test_ends_the_others(tmp_path: Path) -> None:
    file = tmp_path / "test_made_up_suite.py"
    file.write_text(SUITE, encoding="utf-8")
    result = Result(tmp_path / "result.json", {})
    result.begin("a 1/2")
    case = Case("a 1/2", Context("tiny", False, tmp_path, 0.0), result)
    values = contact_suite.run_tests([str(file)], "gpu and not timing", "1/1", case)
    assert values["collected"] == 6
    assert values["counts"] == {"passed": 2, "failed": 2, "crashed": 1, "skipped": 1}
    assert [row["id"].rpartition("::")[2] for row in values["failures"]] == [
        "test_fails",
        "test_crashes",
        "test_loses_the_device",
    ]
    assert "assert 1 == 2" in values["failures"][0]["message"] and "-9" in values["failures"][1]["message"]
    assert [process["exit"] for process in values["processes"]] == [-9, 2, 0]
    figures = list(contact_page.gpu_tests("a 1/2", values, {}))
    assert figures[0].value == "2 of 6 passed, 1 skipped" and not figures[0].reached and len(figures) == 4


def test_a_large_folder_is_shared_out_without_a_rest(tmp_path: Path) -> None:
    ids = []
    for number in range(1, 4):
        log = contact_pytest.Log(tmp_path / f"{number}.jsonl", f"{number}/3")
        items: list[Any] = [type("Item", (), {"nodeid": str(index)})() for index in range(7)]
        log.pytest_collection_modifyitems(None, items)  # type: ignore[arg-type]
        ids += [item.nodeid for item in items]
    assert sorted(ids) == [str(index) for index in range(7)]


def test_every_file_with_tests_for_a_gpu_is_in_a_case() -> None:
    planned = contact_suite.cases(Context("full", False, Path(), 0.0))
    files = {file for work in planned.values() for file in work.args[0]}  # type: ignore[attr-defined]
    marked = {
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()
    }
    assert marked - {"tests/system/benchmarks/test_first_contact.py"} <= files


# All of it --------------------------------------------------------------------------------------------------


def test_all_parts_run_to_their_end_on_a_simulated_device(tmp_path: Path) -> None:
    if (reason := simulated_cuda.unavailable_reason()) is not None:
        pytest.skip(f"no simulated device: {reason}")
    surroundings = {name: value for name, value in os.environ.items() if name != "SRCFAST_KERNELS"}
    command = [sys.executable, "-m", "srcfast_benchmarks.first_contact", "--shapes", "tiny", "--simulated"]
    command += ["--minutes", "60", "--output", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {part.name: read(tmp_path / f"{part.name}.json") for part in PARTS}
    trouble = {
        f"{name}, {case}": values.get("traceback") or values
        for name, result in results.items()
        for case, values in (result or {"cases": {"missing": {"status": "missing"}}})["cases"].items()
        if values["status"] != "done" and not (name == "peers" and "not installed" in values.get("why", ""))
    }
    assert trouble == {}, done.stdout
    whole: dict[str, dict[str, Any]] = {name: result for name, result in results.items() if result is not None}
    assert all(result["status"] == "complete" and result["simulated"] for result in whole.values())
    assert all(result["machine"]["gpu"].endswith("(simulated)") for result in whole.values())
    # Each part did its work: a few numbers that only real work gives.
    demo = whole["demo"]["cases"]["bf16"]
    assert {row["model"] for row in demo["evaluations"]} == {"base", "rationale", "iteration-1"}
    assert all(not case["failures"] and case["counts"]["passed"] > 0 for case in whole["gpu_tests"]["cases"].values())
    for case in whole["dpo_steps"]["cases"].values():
        assert len(set(case["losses"])) > 1 and case["profile"]["kernels"] and case["forecast"]["peak_gib"] > 0
    for name, case in whole["beam_search"]["cases"].items():
        assert len(case["marks"]) == 3 and ("ms_a_step" in case) == ("full rows" in name)
    assert all(case["tokens"] > 0 and case["decoding"]["mean_nats"] >= 0 for case in whole["drift"]["cases"].values())
    assert whole["judging"]["cases"]["8 candidates, all pairs"]["profile"]["busy"] > 0
    assert all("times" in case["ways"]["srcfast"] for case in whole["kernels"]["cases"].values())
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# First contact with a GPU: simulated")
    assert all(part.about in page for part in PARTS)


def test_the_commit_is_known_in_a_work_tree_alone(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
