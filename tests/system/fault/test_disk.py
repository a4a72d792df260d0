"""A run on a real small disk that fills, runs out of inodes or becomes read-only: told by name, continued once that is mended.

Each attempt ends with an error that names the file, never with a trace; no half of a file stands in its place, no finished
stage is lost; and once there is room the same command comes to the undisturbed run's files, byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.small_disk import Disk, DiskServer, why_not
from helpers.small_run import Attempt, Server, assert_same, finished_stages

from srcfast.run.directory import StageMetrics

NO_ROOM, READ_ONLY, NO_QUOTA = "No space left on device", "Read-only file system", "Disk quota exceeded"
# Where the disk fills: at the opening of what file.
FILLED = (
    "open checkpoint/rationale/.step-00000008.tmp/.weights.safetensors",
    "os.mkdir rationale/adapter/.adapter_model.safetensors",
    "open checkpoint/iteration-1/candidates/.00000.jsonl",
    "open iteration-1/candidates/.00000.jsonl",
    "open report/.index.html",
)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskServer]:
    if reason := why_not():
        pytest.skip(reason)
    server = DiskServer(tmp_path_factory.mktemp("disks"))
    yield server
    server.close()


def disk_of(disks: DiskServer, folder: Path, options: str) -> Disk:
    return Disk(disks, folder / "output", options)


def assert_told(disk: Disk, attempt: Attempt, words: str = NO_ROOM, name: str = "") -> None:
    """The attempt ended by naming a file of the disk (this one, where a name is given), and left nothing half-written.

    Where it could remove nothing, the attempt that continues does.
    """
    said = attempt.said.replace("\n", "")
    assert attempt.status == 1 and "Traceback" not in said, attempt.said
    assert words in said and "Fix" in said, attempt.said
    assert f"srcfast: {disk.output}/" in said and name in said, attempt.said
    assert words == READ_ONLY or [str(path) for path in disk.run.rglob(".*.tmp")] == []


def name_of(point: str) -> str:
    """The name that a file of a point gets once it is whole; of a checkpoint, its directory's."""
    place = point.split()[1].removesuffix(".tmp")
    if ".step-" in place:
        place = place.partition(".tmp/")[0]
    folder, _, name = place.rpartition("/")
    return f"{folder}/{name.removeprefix('.')}"


def assert_filled_and_told(disk: Disk, fault: dict[str, Any], named: bool = True, again: bool = False) -> str:
    """The disk fills at a point, is told to be full and is emptied of what filled it; returns the point, "" if none was met.

    Args:
        fault: the point.
        named: by the point's own file; else by any, for what is appended may find room in a block that is begun.
        again: the same command is told so, too, as long as the disk is full.
    """
    before = finished_stages(disk.run)
    filler = str(disk.output / "filler")
    attempt = disk.attempt({"kind": "fill", "filler": filler} | fault)
    if attempt.status == 0:
        return ""
    assert len(attempt.points) == 1, attempt.said
    assert_told(disk, attempt, name=name_of(attempt.points[0]) if named else "")
    if again:
        assert_told(disk, disk.attempt())
    assert finished_stages(disk.run)[: len(before)] == before
    disk.server.do("rm", "-r", filler)
    return attempt.points[0]


def test_a_disk_that_fills_in_any_stage_is_told_by_file_and_the_run_goes_on(
    disks: DiskServer, truth: dict[str, Any], tmp_path: Path
) -> None:
    disk = disk_of(disks, tmp_path, "size=8m")
    for point in FILLED:
        assert assert_filled_and_told(disk, {"only": point}, again=point == FILLED[1])
    assert disk.attempt().status == 0
    assert_same(disk.run, truth, disk.output)
    disk.close()


@pytest.mark.fault
def test_a_disk_that_fills_at_any_file_costs_nothing_that_was_finished(
    disks: DiskServer, truth: dict[str, Any], tmp_path: Path
) -> None:
    disk, seen = disk_of(disks, tmp_path, "size=8m"), []
    room = random.Random(str(tmp_path))
    while point := assert_filled_and_told(
        disk, {"only": "open ", "seen": seen, "every": 2, "leave": 4096 * room.randrange(3)}, named=False
    ):
        seen.append(point)
    print(f"{len(seen)} times full")
    assert len(seen) >= 20
    assert_same(disk.run, truth, disk.output)
    disk.close()


@pytest.mark.fault
@pytest.mark.parametrize("option, first, more", [("size", 64 << 10, 192 << 10), ("nr_inodes", 12, 6)])
def test_a_disk_that_is_too_small_and_grown_again_and_again_costs_nothing_that_was_finished(
    disks: DiskServer, truth: dict[str, Any], tmp_path: Path, option: str, first: int, more: int
) -> None:
    disk, size, grown, before = disk_of(disks, tmp_path, f"{option}={first}"), first, 0, []
    while (attempt := disk.attempt()).status:
        assert_told(disk, attempt)
        assert finished_stages(disk.run)[: len(before)] == before
        before, grown, size = finished_stages(disk.run), grown + 1, size + more
        disk.change(f"{option}={size}")
    print(f"{grown} times too small, {option}={size} at last")
    assert grown >= 8
    assert_same(disk.run, truth, disk.output)
    disk.close()


@pytest.mark.parametrize(
    "point", ["open iteration-1/scores/", pytest.param("os.mkdir checkpoint/iteration-1/dpo/", marks=pytest.mark.fault)]
)
def test_a_disk_without_inodes_is_told_by_file_and_the_run_goes_on(
    disks: DiskServer, truth: dict[str, Any], tmp_path: Path, point: str
) -> None:
    disk = disk_of(disks, tmp_path, "nr_inodes=300")
    assert assert_filled_and_told(disk, {"only": point, "filler": f"{disk.output}/filler/"})
    assert disk.attempt().status == 0
    assert_same(disk.run, truth, disk.output)
    disk.close()


@pytest.mark.parametrize(
    "point",
    [
        "open checkpoint/iteration-1/candidates/.00000.jsonl",
        *(
            pytest.param(point, marks=pytest.mark.fault)
            for point in (
                "open checkpoint/rationale/.step-00000008",
                "os.rename iteration-1/preferences/",
                "open report/",
            )
        ),
    ],
)
def test_a_disk_that_becomes_read_only_is_told_by_file_and_the_run_goes_on(
    disks: DiskServer, truth: dict[str, Any], tmp_path: Path, point: str
) -> None:
    disk = disk_of(disks, tmp_path, "size=8m")
    covered = str(disk.output / "small")
    attempt = disk.attempt({"kind": "cover", "cover": covered, "only": point})
    stages = finished_stages(disk.run)
    assert stages and attempt.points
    assert_told(disk, attempt, READ_ONLY, name_of(attempt.points[0]))
    disks.do("umount", covered)
    disk.change("ro")
    assert_told(disk, disk.attempt(), READ_ONLY)  # so from its beginning
    disk.change("rw")
    assert finished_stages(disk.run) == stages
    assert disk.attempt().status == 0
    assert_same(disk.run, truth, disk.output)
    disk.close()


@pytest.mark.parametrize(
    "point",
    [
        "open iteration-1/candidates/",
        *(
            pytest.param(point, marks=pytest.mark.fault)
            for point in (
                "os.mkdir iteration-1/adapter/",
                "open checkpoint/rationale/.step-00000008",
                "open .manifest.json",
            )
        ),
    ],
)
def test_a_quota_that_is_told_at_the_flush_to_disk_is_told_by_file_and_the_run_goes_on(
    server: Server, truth: dict[str, Any], tmp_path: Path, point: str
) -> None:
    attempt = server.run(tmp_path, {"kind": "quota", "only": point})
    said = attempt.said.replace("\n", "")
    assert attempt.status == 1 and NO_QUOTA in said and "Traceback" not in said, attempt.said
    assert f"{tmp_path}/small/{name_of(attempt.points[0]).lstrip('/')}" in said and "Fix" in said, attempt.said
    assert not list((tmp_path / "small").rglob(".*.tmp"))
    assert server.run(tmp_path).status == 0
    assert_same(tmp_path / "small", truth)


def test_metrics_without_room_name_their_file() -> None:
    metrics = StageMetrics(Path("/dev/full"))
    with pytest.raises(OSError, match=f"{NO_ROOM}: '/dev/full'"):
        metrics.write({"loss": 1.0})
