"""Commands give PyTorch's CUDA allocator expandable segments before torch is imported, unless the user has set it up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from srcfast.memory.allocator import VARIABLES, allocator_variables

# What a command has set when torch is imported, and what torch itself has read after it: a CPU build reads the same variables.
CODE = """
import os, sys
from srcfast.cli.app import app
from srcfast.memory.allocator import VARIABLES

class AtImport:
    def find_spec(self, name, *rest):
        if name == "torch" and not set_then:
            set_then.extend(os.environ[one] for one in VARIABLES if one in os.environ)

set_then = []
sys.meta_path.insert(0, AtImport())
try:
    app(["replay", "/no/such/directory"])
except SystemExit:
    pass
read = getattr(sys.modules["torch"]._C, "_accelerator_getAllocatorSettings", None)  # from torch 2.12 on
print(*set_then, *([] if read is None else [read()]), sep="\\n")
"""


@pytest.mark.parametrize(
    ("variables", "read"),
    [
        ({}, "expandable_segments:True"),
        # One of torchrun's ranks, where torch is imported before the command's own imports.
        (
            {
                "TORCHELASTIC_RUN_ID": "none",
                "RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
            },
            "expandable_segments:True",
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_torch_reads_expandable_segments_or_what_the_user_says(variables: dict[str, str], read: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | variables,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {read}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["", "backend:cudaMallocAsync", "expandable_segments:False"])
def test_a_variable_that_the_user_has_set_in_any_name_and_to_any_value_wins(name: str, value: str) -> None:
    assert allocator_variables({name: value}) == {}
    assert allocator_variables({"OTHER": value}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
