"""Every kernel compiles for GPUs that aren't here, spills nothing, fits, and takes no more than the table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import ARCHITECTURES, TABLE, cases

ROOT = Path(__file__).parents[3]
PROGRAM = "import json, sys; from ahead_of_time import resources; print(json.dumps(resources(int(sys.argv[1]))))"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_within_the_table(architecture: int, tmp_path: Path) -> None:
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    table = json.loads(TABLE.read_text(encoding="utf-8"))[str(architecture)]
    assert compiled.keys() == table.keys()
    for name, used in compiled.items():
        assert used["spilled"] == 0, name
        assert used["shared"] <= ARCHITECTURES[architecture], name
        # Another Triton allots registers a little differently; half as many again is another kernel.
        assert used["registers"] <= 1.25 * table[name]["registers"] + 8, (name, used, table[name])
        assert used["shared"] <= 2 * table[name]["shared"] + 1024, (name, used, table[name])


def test_every_kernel_of_the_package_is_in_the_table() -> None:
    kernels = set()
    for file in (ROOT / "kernels" / "srcfast_kernels").glob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if line == "@triton.jit" and lines[number + 1].partition("(")[0].endswith("_kernel"):
                kernels.add(lines[number + 1].removeprefix("def ").partition("(")[0])
    assert kernels == {case.kernel.__name__ for case in cases(90)} and len(kernels) >= 11
