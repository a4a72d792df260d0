"""The ways to install agree with setup.py: files, versions, extras, and an image without root and without secrets."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from srcfast_kernels import native

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


DOCKERFILE = instructions()


def required() -> dict[str, SpecifierSet]:
    """What setup.py always requires, by name."""
    [call] = [
        node for node in ast.walk(ast.parse(SETUP)) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    ]
    requirements = [Requirement(text) for text in ast.literal_eval(call.value)]
    return {one.name: one.specifier for one in requirements}


def extras() -> set[str]:
    [value] = [
        node.value for node in ast.parse(SETUP).body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS"
    ]  # type: ignore[attr-defined]
    assert isinstance(value, ast.Dict)
    return {key.value for key in value.keys if isinstance(key, ast.Constant)}


def arguments() -> dict[str, str]:
    return dict(rest.partition("=")[::2] for name, rest in DOCKERFILE if name == "ARG")


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path of the first level out; its last rule that fits decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    result = False
    for rule in (line for line in lines if line and not line.startswith("#")):
        if fnmatch.fnmatchcase(path, rule.removeprefix("!")):
            result = not rule.startswith("!")
    return result


def test_the_image_s_base_has_a_version_and_its_cuda_is_torch_s() -> None:
    [base] = [rest for name, rest in DOCKERFILE if name == "FROM"]
    [(major, minor)] = re.findall(r"^nvidia/cuda:(\d+)\.(\d+)\.\d+-cudnn-devel-ubuntu24\.04$", base)
    assert arguments()["TORCH_INDEX"].endswith(f"/cu{major}{minor}")
    assert f"CUDA {major}.{minor}" in PAGE


def test_the_image_has_a_torch_of_setup_py() -> None:
    version = arguments()["TORCH_VERSION"]
    assert required()["torch"].contains(version)
    assert f"torch {version.rpartition('.')[0]}" in PAGE
    assert SpecifierSet(arguments()["FLASH_ATTN"].removeprefix("flash-attn")) == SpecifierSet(">=2.8,<3")


def test_what_the_image_copies_is_there_and_is_all_that_a_build_needs() -> None:
    sources = [source for name, rest in DOCKERFILE if name == "COPY" for source in rest.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists() and not ignored(source), source
    assert {name for name in ("tests", ".git", "docs", "runs", ".venv", ".env") if not ignored(name)} == set()
    packages = set(re.findall(r'"(?:srcfast\w*)": "(\w+)', SETUP))
    read = set(re.findall(r'__file__\)\.parent / "([\w.]+)"', SETUP)) | {
        "csrc",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
    }
    assert packages | read <= {*sources} and len(packages) == 3


def test_the_image_runs_without_root_and_has_no_secrets() -> None:
    names = [name for name, _ in DOCKERFILE]
    [(_, user)] = [(name, rest) for name, rest in DOCKERFILE if name == "USER"]
    assert user not in ("root", "0") and names.index("USER") < names.index("ENTRYPOINT")
    assert all(name != "RUN" for name in names[names.index("USER") :])
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"(?i)api_?key|token|password|secret", text) == []


def test_extras_exist_and_the_page_has_them_all_but_that_of_tests() -> None:
    docker = re.findall(r"/src\[([\w,]+)\]", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    [conda] = [re.findall(r"\[([\w,]+)\]", line)[0] for line in pip_of_conda() if line.startswith(".")]
    for names in [*docker, conda, *re.findall(r"'\.\[([\w,]+)\]'", PAGE)]:
        assert set(names.split(",")) <= extras(), names
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == extras() - {"test"}


def pip_of_conda() -> list[str]:
    [lines] = [part["pip"] for part in ENVIRONMENT["dependencies"] if isinstance(part, dict)]
    return lines


def test_conda_and_uv_take_the_python_and_torch_of_setup_py() -> None:
    [version] = [part.partition("=")[2] for part in ENVIRONMENT["dependencies"] if str(part).startswith("python=")]
    [supported] = re.findall(r'python_requires="(.*?)"', SETUP)
    assert SpecifierSet(supported).contains(version)
    assert SpecifierSet(supported).contains(re.findall(r"uv venv --python (\S+)", PAGE)[0])
    [torch] = [Requirement(line) for line in pip_of_conda() if line.startswith("torch")]
    assert torch.specifier == required()["torch"]
    [torch] = [Requirement(text) for text in re.findall(r"torch-backend=auto '(.*?)'", PAGE)]
    assert torch.specifier == required()["torch"]


def test_the_native_library_is_added_as_the_doctor_advises() -> None:
    before, build = native.BUILD.split(" && ")
    assert PAGE.count(f"\n{before} && {build.replace('--editable .', '.')}\n") == 2
    assert "native library: does not load" in PAGE and "0x020b" in SETUP  # torch 2.11


@pytest.mark.parametrize("script", ["run", "wheels"])
def test_the_scripts_of_ci_can_be_run(script: str) -> None:
    file = ROOT / ".ci" / script
    assert file.stat().st_mode & 0o111
    assert file.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", str(file)], capture_output=True, timeout=60).returncode == 0


def test_the_wheels_are_built_against_the_oldest_torch_of_the_pin() -> None:
    text = (ROOT / ".ci" / "wheels").read_text(encoding="utf-8")
    [oldest] = re.findall(r"'torch==([\d.]+)\.\*'", text)
    assert f">={oldest}" in str(required()["torch"])
    assert f"'{native.BUILD.split(chr(39))[1]}'" in text  # the same setuptools
