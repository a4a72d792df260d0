"""Families whose processors need torchvision, beside a copy of it that no other test sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.further_families import WITH_TORCHVISION
from helpers.torchvision_copy import install
from transformers.utils import is_torchvision_available

TESTS = Path(__file__).parent
CASES = (
    "test_logits_of_every_path_are_those_of_the_ordinary_pass",
    "test_prompts_are_those_of_the_processor_as_documented",
    "test_gradients_of_an_adapter_are_those_of_peft",
    "test_greedy_tokens_are_those_of_generate_under_peft_s_adapter",
)


@pytest.mark.slow
@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed: the other tests cover these families")
def test_families_that_need_torchvision_pass_the_tests_of_the_others(tmp_path: Path) -> None:
    if refusal := install(tmp_path / "copy"):
        pytest.skip(f"no copy of torchvision could be installed: {refusal}")
    files = [TESTS / "test_transformers_lvlm.py", TESTS / "test_transformers_decoding.py"]
    cases = [
        f"{file}::{case}[{name}]"
        for file in files
        for case in CASES
        for name in WITH_TORCHVISION
        if f"def {case}(" in file.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "helpers.torchvision_copy", str(tmp_path / "copy"), "pytest", "-rA", *cases]
    path = os.pathsep.join([str(TESTS.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    passed = re.findall(r"^PASSED .*\[(\w+)\]$", result.stdout, re.MULTILINE)
    assert sorted(passed) == sorted(len(CASES) * list(WITH_TORCHVISION))
