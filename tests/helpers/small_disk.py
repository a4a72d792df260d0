"""A server of attempts in a mount namespace of its own, where real small disks (tmpfs) are mounted, filled and grown."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.small_run import Attempt, Server

NAMESPACE = ("unshare", "--mount", "--map-root-user")


def why_not() -> str:
    """Why no disk can be mounted here; empty if one can."""
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"no mount namespaces here: {error}"
    return f"no mount namespaces here: {done.stderr.strip()}" if done.returncode else ""


class DiskServer(Server):
    """Its attempts see the disks, this process sees them as `Disk.run`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, NAMESPACE)
        while Path(f"/proc/{self.process.pid}/cmdline").read_bytes().startswith(b"unshare"):
            time.sleep(0.01)  # until the namespace is made

    def do(self, *words: str) -> None:
        """A command among the mounts."""
        inside = ("nsenter", f"--target={self.process.pid}", "--user", "--mount", "--preserve-credentials")
        subprocess.run([*inside, *words], check=True, capture_output=True, text=True)


class Disk:
    """A tmpfs of its own on which one run lies.

    Args:
        server: that runs the attempts.
        output: where it is mounted; made.
        options: of the mount: `size=1m`, `nr_inodes=200`.
    """

    def __init__(self, server: DiskServer, output: Path, options: str) -> None:
        self.server, self.output = server, output
        self.log = output.with_name(f"{output.name}.txt")  # not on the disk: it is to tell what it has no room for
        output.mkdir()
        server.do("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(output))

    @property
    def run(self) -> Path:
        """The run's directory as this process can read it."""
        return Path(f"/proc/{self.server.process.pid}/root{self.output}/small")

    def change(self, options: str) -> None:
        """Mount it anew with other options: a larger size, or `ro`."""
        self.server.do("mount", "-o", f"remount,{options}", str(self.output))

    def attempt(self, fault: dict[str, Any] | None = None, words: Sequence[str] = ()) -> Attempt:
        """`srcfast calibrate` once, onto this disk."""
        return self.server.run(self.output, fault, self.log, words)

    def close(self) -> None:
        self.server.do("umount", "--lazy", str(self.output))
