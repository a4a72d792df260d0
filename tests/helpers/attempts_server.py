"""Runs `srcfast` in forked children that a fault befalls; what is heavy is imported once, before.

A program: one JSON request a line on stdin, one JSON answer a line on stdout. A request: `words` (the command line), `fault`
(see `Faults`), `log` (where the child's output goes) and `limit` (seconds). The answer: `status` as `subprocess` gives it,
negative for a signal, and the `points` of writing at which something befell it.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from typing import Any

LIMIT = 1800.0  # seconds, on a busy machine


class Faults:
    """What befalls this process at its points of writing.

    A point is an event on a file within `inside` and how often it was met: `os.rename small/manifest.json 2`. Temporary names
    carry no process number. Points come before what they name: `open` to write, `rename`, `remove`, `mkdir`, `rmdir`, `fsync`.

    Args:
        fault: `inside` (a directory), `kind`:
            "kill": SIGKILL at the first point that is not in `seen`, of those that begin with `only` and whose checksum `every`
            divides; so the next ones, too;
            "tear": the same at an fsync only, the file cut in half before, as a machine leaves it that loses its power;
            "full": from that point on files take no byte (ENOSPC);
            "quota": from that point on what is written is found to have no room when it is flushed to disk (EDQUOT at fsync);
            "read-only": from that point on nothing can be opened to write, renamed or removed (EROFS);
            "fill": at that point `filler` takes all room of the disk that it lies on but for `leave` bytes, or, where `filler`
            ends in "/", all its inodes;
            "cover": at that point the directory `cover` is mounted read-only over itself, as it is;
            "twice": at that point a second process is started on the same directory, and waited for;
            "backwards": the clock goes back by an hour at each call;
            "moment": `signal` comes, from another process, `after` seconds from the beginning of `stage` (or from when it has
            done `behind` units of its work), and before its end;
            "none".
        points: appended to by one line a point, at once, so that a killed process has told them.
    """

    def __init__(self, fault: dict[str, Any], points: Any) -> None:
        self.fault = fault
        self.kind, self.inside = fault.get("kind", "none"), fault.get("inside", "")
        self.seen, self.points = set(fault.get("seen", ())), points
        self.met: dict[str, int] = {}
        self.failing = False  # the disk is full, or read-only

    def begin(self) -> None:
        fsync, clock = os.fsync, time.time
        os.fsync = lambda handle: (self.at("fsync", os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))[1]
        sys.addaudithook(self.audit)
        if self.kind == "full":
            self.fill()
        if self.kind == "moment":
            self.expect()
        if self.kind == "backwards":
            calls = iter(range(1, 1 << 40))
            time.time = lambda: clock() - 3600.0 * next(calls)

    def fill(self) -> None:
        """Files are opened as ever and take no byte: also what is buffered fails."""
        opened = builtins.open

        def on_a_full_disk(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            if self.failing and set(mode) & set("wxa+") and str(file).startswith(self.inside):
                opened(file, mode, *more, **options).close()
                return opened("/dev/full", "wb" if "b" in mode else "w", **({} if "b" in mode else options))
            return opened(file, mode, *more, **options)

        builtins.open = on_a_full_disk

    def expect(self) -> None:
        """A process that strikes this one is started with the stage's progress; the stage isn't entered before it has.

        Of several ranks any may be struck: none waits for the others at the end of its work before it was.
        """
        from srcfast import distributed
        from srcfast.run.directory import RunDirectory
        from srcfast.run.progress import StageProgress

        begin, advance, finish, meet = (
            StageProgress.__init__,
            StageProgress.advance,
            RunDirectory.finish_stage,
            distributed.barrier_with_heartbeat,
        )
        stage, behind, victim, striker = self.fault["stage"], self.fault.get("behind", 0), os.getpid(), 0
        reading, writing = os.pipe()  # a byte when `behind` units are done, and one at the end of the stage's work

        def begin_and_expect(track: Any, name: str, *more: Any, **options: Any) -> None:
            nonlocal striker
            begin(track, name, *more, **options)
            if name == stage and (striker := os.fork()) == 0:
                os.close(self.points)
                if not behind or told_within(3600.0):
                    told_within(self.fault["after"])
                if os.getppid() == victim:
                    os.kill(victim, self.fault["signal"])
                os._exit(0)

        def told_within(seconds: float) -> bool:
            """Wait so long for a byte from the victim, and as long as it is there."""
            end = time.monotonic() + seconds
            while os.getppid() == victim and (left := end - time.monotonic()) > 0:
                if select.select([reading], [], [], min(left, 1.0))[0]:
                    return bool(os.read(reading, 1))
            return False

        def advance_and_tell(track: Any, *more: Any, **options: Any) -> None:
            nonlocal behind
            advance(track, *more, **options)
            if striker and behind and track.done >= behind:
                behind = 0
                os.write(writing, b".")

        def be_struck() -> None:
            nonlocal striker
            if striker:
                os.write(writing, b".." if behind else b".")
                os.waitpid(striker, 0)
                striker = 0

        def finish_once_struck(directory: Any, name: str, *more: Any, **options: Any) -> Any:
            be_struck()
            return finish(directory, name, *more, **options)

        def meet_once_struck() -> None:
            if distributed.world_size() > 1:
                be_struck()
            meet()

        StageProgress.__init__, StageProgress.advance = begin_and_expect, advance_and_tell
        RunDirectory.finish_stage, distributed.barrier_with_heartbeat = finish_once_struck, meet_once_struck

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.at("open", path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self.at(event, os.fspath(arguments[1] if event == "os.rename" else arguments[0]))

    def at(self, event: str, path: Any) -> None:
        if not isinstance(path, str) or not path.startswith(self.inside):
            return
        if self.failing and self.kind == "quota" and event == "fsync":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))  # of a handle, so without a name
        if self.failing and self.kind != "quota" and (self.kind == "read-only" or event == "fsync"):
            number = errno.EROFS if self.kind == "read-only" else errno.ENOSPC
            raise OSError(number, os.strerror(number), path)
        name = re.sub(r"\.\d+\.tmp", ".tmp", f"{event} {path.removeprefix(self.inside).lstrip('/')}")
        self.met[name] = self.met.get(name, 0) + 1
        point = f"{name} {self.met[name]}"
        if self.failing or point in self.seen or not point.startswith(self.fault.get("only", "")):
            return
        if zlib.crc32(point.encode()) % self.fault.get("every", 1) or (self.kind == "tear" and event != "fsync"):
            return
        if self.kind not in ("none", "moment", "backwards"):
            os.write(self.points, f"{point}\n".encode())
            self.befall(point, path)

    def befall(self, point: str, path: str) -> None:
        if self.kind in ("full", "quota", "read-only"):
            self.failing = True
        elif self.kind in ("fill", "cover"):
            kind, self.kind = self.kind, "none"
            fill(self.fault["filler"], self.fault.get("leave", 0)) if kind == "fill" else cover(self.fault["cover"])
        elif self.kind == "twice":
            self.seen.add(point)
            if (second := os.fork()) == 0:
                run_and_end(self.fault["words"])
            status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            os.write(self.points, f"the second one ended with status {status}\n".encode())
            self.kind = "none"
        else:
            if self.kind == "tear" and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def fill(filler: str, leave: int) -> None:
    """Take all room of the disk that `filler` lies on but for `leave` bytes, or, where it ends in "/", all inodes."""
    try:
        if filler.endswith("/"):
            os.makedirs(filler)
            for number in range(1 << 20):
                open(f"{filler}{number}", "x").close()
        with open(filler, "xb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    if leave:
        os.truncate(filler, os.path.getsize(filler) - leave)


def cover(directory: str) -> None:
    """Mount a directory read-only over itself: what is opened in it already stays writable, as the file that holds the lock."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)


def child(request: dict[str, Any], points: Any) -> None:
    """Run the command line as a process of its own and end with its status."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Faults(request["fault"] | {"words": request["words"]}, points).begin()
    run_and_end(request["words"])


def run_and_end(words: list[str]) -> None:
    """The command line with these words, as the rest of this process."""
    from srcfast.cli.app import app

    status = 1
    try:
        app(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and tell how it ended."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        child(request, writing)
    os.close(writing)
    end = time.monotonic() + request.get("limit", LIMIT)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() >= end:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    with os.fdopen(reading, encoding="utf-8") as told:
        points = told.read().splitlines()
    return {"status": os.waitstatus_to_exitcode(status), "points": points}


def import_once() -> None:
    """Import all that a calibration needs, so that its processes, forked from this one, do not."""
    import torch

    torch.set_num_threads(1)
    import torch.distributed.fsdp
    import torch.profiler
    import transformers.models.llava.modeling_llava  # noqa: F401

    import srcfast.calibrate
    import srcfast.cli.commands
    import srcfast.recipes.pretrain_base  # noqa: F401

    with suppress(ImportError):  # the report has no plots without it
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401


def main() -> None:
    import_once()
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
