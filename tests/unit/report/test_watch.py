"""The live page of a run in all its states, and the server that hands it to this machine's browsers alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from helpers.made_up_run import make_run
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.errors import InputError
from srcfast.report import live_page
from srcfast.report.live_page import render_live
from srcfast.report.newest_candidates import newest_candidates
from srcfast.report.page import write_report
from srcfast.report.run_files import read_run
from srcfast.report.watch import LiveServer, live_server
from srcfast.run.stage_names import planned_stages


def begun(run: Path, finished: tuple[str, ...] = (), iterations: int = 1) -> Path:
    """A run directory with settings and these finished stages."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"name": run.name, "iterations": iterations}))
    entries: dict[str, Any] = {name: {"seconds": 2.0, "tokens": 10, "peak_rss_bytes": 5} for name in finished}
    for name in finished:
        if name.endswith("/evaluation"):
            of = name.partition("/")[0]
            row = {"model": of, "dataset": "d", "split": "s", "n": 8, "accuracy": 0.375}
            entries[name]["entries"] = [row]
    if finished:
        (run / "manifest.json").write_text(json.dumps(entries))
    return run


def write_progress(run: Path, stage: str, done: int, total: int, **values: Any) -> None:
    folder = run / "checkpoint" / stage
    folder.mkdir(parents=True, exist_ok=True)
    row = {"stage": stage, "done": done, "total": total, "unit": "steps", "tokens": 0, "seconds": 30.0}
    (folder / "progress.json").write_text(json.dumps(row | {"written": time.time()} | values))


def write_rows(file: Path, *rows: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def candidate(sample: str, index: int, text: str) -> dict[str, Any]:
    return {"id": f"{sample}#{index}", "sample_id": sample, "text": text}


# The page ----------------------------------------------------------------------------------------------------


def test_before_the_first_stage(tmp_path: Path) -> None:
    for run in (tmp_path, begun(tmp_path / "run")):
        html = render_live(run)
        assert "No stage has begun." in html and 'http-equiv="refresh"' in html


def test_in_the_middle_of_a_stage(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", ("base/evaluation",))
    write_progress(run, "rationale", 10, 40)
    rows = [{"stage": "rationale", "step": step, "loss": 1.5, "learning_rate": 0.1} for step in range(10)]
    write_rows(run / "metrics.jsonl", *rows)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "rationale", "step": 10, "lo')  # being written
    html = render_live(run)
    assert "<b>rationale</b>: 10 of 40 steps, 0:01:30 left" in html and "25.0 %" in html
    assert "Finished: base/evaluation. To come: rationale/evaluation, iteration-1/candidates" in html
    assert "37.5" in html  # the base's accuracy
    assert '<td class="text">rationale</td><td>10</td>\n<td>1.500</td>' in html
    assert "Nothing was recorded since" not in html
    write_progress(run, "rationale", 10, 40, written=time.time() - 300)
    assert "Nothing was recorded since" in render_live(run)


def test_between_two_stages_and_at_the_end(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", ("base/evaluation", "rationale"))
    write_progress(run, "rationale", 40, 40)  # of a finished stage, left by a process that was killed
    assert "Between two stages." in render_live(run)
    html = render_live(begun(tmp_path / "run", tuple(planned_stages(1))))
    assert "This run is done." in html and 'http-equiv="refresh"' not in html
    done = render_live(make_run(tmp_path / "done"))
    assert "This run is done." in done and 'http-equiv="refresh"' not in done


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "x"}', '{"stage": 1, "done": -1}', "\0"])
def test_a_progress_file_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", ("base/evaluation",))
    write_progress(run, "rationale", 1, 2)
    (run / "checkpoint" / "rationale" / "progress.json").write_text(text)
    assert "Between two stages." in render_live(run)


def test_a_damaged_file_is_named_on_the_page(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", ("base/evaluation",))
    (run / "manifest.json").write_text("{<half")
    html = render_live(run)
    assert "manifest.json: expected JSON" in html and 'http-equiv="refresh"' in html
    (run / "manifest.json").write_text('{"base/evaluation": {"seconds": "x"}}')
    assert "field &#39;base/evaluation.seconds&#39;" in render_live(run)


def test_data_are_text_on_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = begun(tmp_path / "run", ("base/evaluation",))
    write_progress(run, "<script>", 1, 2, unit=evil)
    write_rows(run / "metrics.jsonl", {"stage": evil, "step": 0, "loss": 1.0})
    write_rows(run / "checkpoint/iteration-1/candidates/00000.jsonl", candidate(evil, 0, evil))
    html = render_live(run)
    assert html.count("&lt;script&gt;") >= 4 and "<script" not in html
    assert "http:" not in html.replace("http-equiv", "") and "https:" not in html


def test_a_long_training_is_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "MAX_POINTS", 4)
    run = begun(tmp_path / "run")
    write_rows(run / "metrics.jsonl", *({"stage": "rationale", "step": step, "loss": 1.0} for step in range(10)))
    thinned = live_page._thinned(read_run(run, live=True))
    assert [row["step"] for row in thinned.metrics] == [0, 3, 6, 9]


# Newest candidates -------------------------------------------------------------------------------------------


def test_candidates_without_scores_are_those_of_the_newest_chunk(tmp_path: Path) -> None:
    chunks = tmp_path / "checkpoint" / "iteration-2" / "candidates"
    write_rows(tmp_path / "iteration-1" / "candidates" / "00000.jsonl", candidate("old", 0, "x"))
    write_rows(chunks / "00001.jsonl", {"fingerprint": "f"}, candidate("a", 0, "first"), candidate("a", 1, "second"))
    write_rows(chunks / "00000.jsonl", {"fingerprint": "f"}, candidate("b", 0, "third"), candidate("c", 0, "fourth"))
    os.utime(chunks / "00001.jsonl", ns=(10, 10))
    number, newest = newest_candidates(tmp_path)
    assert number == 2
    assert [(one.sample_id, [(c.text, c.score) for c in one.candidates]) for one in newest] == [
        ("c", [("fourth", None)]),
        ("b", [("third", None)]),
    ]


def test_scored_candidates_come_by_descending_score(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "iteration-1" / "candidates" / "00000.jsonl",
        *(candidate(sample, index, f"{sample}{index}") for sample in "abcdef" for index in range(3)),
    )
    rows = [
        {"sample_id": sample, "candidate_ids": [f"{sample}#{i}" for i in range(3)], "scores": [0.25, 1, 0.5]}
        for sample in "abcdef"
    ]
    file = tmp_path / "checkpoint" / "iteration-1" / "scores" / "00000.jsonl"
    write_rows(file, {"fingerprint": "f"}, *rows[:5])
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(rows[5])[:-9])  # half a row
    number, newest = newest_candidates(tmp_path)
    assert number == 1 and [one.sample_id for one in newest] == ["e", "d", "c", "b"]  # whole lines
    assert [(c.text, c.score) for c in newest[0].candidates] == [("e1", 1), ("e2", 0.5), ("e0", 0.25)]


def test_what_is_no_candidate_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "iteration-1" / "candidates"
    write_rows(folder / "00000.jsonl", {"id": 1, "sample_id": [], "text": None})
    os.mkfifo(folder / "00001.jsonl")  # reading it would never end
    assert newest_candidates(tmp_path) == (1, [])
    (tmp_path / "iteration-x").mkdir()
    assert newest_candidates(tmp_path / "none") == (0, [])


# The page of `srcfast report` --------------------------------------------------------------------------------


def test_report_of_a_run_that_is_not_done_says_what_is_missing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", ("base/evaluation",))
    write_progress(run, "rationale", 10, 40, written=0.0)
    html = write_report(run).read_text(encoding="utf-8")
    assert "This run is not done." in html and "Finished: base/evaluation." in html
    assert "Under way or stopped: rationale, 10 of 40 steps at 1970-01-01 00:00:00 UTC, 0:01:30 left." in html
    assert "37.5" in html and "iteration-1/dpo, iteration-1/evaluation." in html
    assert "not done" not in write_report(make_run(tmp_path / "done")).read_text(encoding="utf-8")


def test_report_of_a_run_that_goes_on_is_of_the_manifest(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", tuple(planned_stages(1)), iterations=2)
    old = {"stages": [{"name": "base/evaluation", "seconds": 1.0}]}
    (run / "summary.json").write_text(json.dumps(old))
    read = read_run(run)
    assert [row["model"] for row in read.evaluations] == ["base", "rationale", "iteration-1"]
    assert read.remaining == planned_stages(2)[9:] and read.remaining[0] == "iteration-2/candidates"


# The server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    made = live_server(begun(tmp_path / "run", ("base/evaluation",)))
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def answer(server: LiveServer, method: str = "GET", path: str = "/", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def test_the_page_is_served_on_the_loopback_address_alone(server: LiveServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    response = answer(server)
    policy = response.getheader("Content-Security-Policy") or ""
    assert response.status == 200 and b"Between two stages." in response.read()
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert response.getheader("Cache-Control") == "no-store"
    assert answer(server, Host=f"localhost:{server.server_address[1]}").status == 200
    head = answer(server, "HEAD")
    assert (head.status, head.read()) == (200, b"")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost", "127.0.0.1:1", "", "[::1]:80"])
def test_another_host_is_refused(host: str, server: LiveServer) -> None:
    response = answer(server, Host=host)
    assert response.status == 403 and b"stages" not in response.read()


def test_a_request_without_a_host_or_with_two_is_refused(server: LiveServer) -> None:
    import socket

    port = server.server_address[1]
    for head in ("", f"Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"GET / HTTP/1.0\r\n{head}\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.0 403")


@pytest.mark.parametrize(
    "path", ["/../config.yaml", "/config.yaml", "/%2e%2e/config.yaml", "/?x=1", "/report/index.html"]
)
def test_another_path_is_refused(path: str, server: LiveServer) -> None:
    response = answer(server, path=path)
    assert response.status == 404 and b"iterations" not in response.read()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_refused(method: str, server: LiveServer) -> None:
    assert answer(server, method).status == 501


def test_a_page_is_rendered_at_most_once_a_second(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from srcfast.report import watch

    rendered: list[Path] = []
    monkeypatch.setattr(watch, "render_live", lambda run: rendered.append(run) or f"page {len(rendered)}")
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    page = watch.LivePage(Path("run"))
    assert [page.html(), page.html()] == [b"page 1", b"page 1"]
    clock[0] += 1.0
    assert page.html() == b"page 2"


def test_a_directory_that_is_none_and_a_port_in_use_are_refused(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: expected a directory"):
        live_server(tmp_path / "none")
    words = ["watch", str(tmp_path), "--port", str(server.server_address[1])]
    refused: Result = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "--port: expected a free port" in refused.output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_the_command_without_an_error(number: int, status: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srcfast", "watch", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == status and "Traceback" not in said
