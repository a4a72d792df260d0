"""The package as users install it: names that must not be shadowed, what a wheel holds, what a command costs."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from srcfast.cli.model_tools import OPTIONAL
from srcfast_kernels import native

ROOT = Path(__file__).parents[3]
PARTS = {
    ROOT / "srcfast": "srcfast",
    ROOT / "kernels" / "srcfast_kernels": "srcfast_kernels",
    ROOT / "benchmarks": "srcfast_benchmarks",
}


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints; it sees none of this process's environment."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# kernels/ and PyPI's `kernels` --------------------------------------------------------------------------------


def test_the_kernels_folder_is_no_package_at_the_repository_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # With PyPI's `kernels` installed that one must win; without it this is a bare namespace, which has no file.
    code = (
        "import importlib.metadata as metadata, kernels, srcfast_kernels\n"
        "installed = any(one.metadata['Name'] == 'kernels' for one in metadata.distributions())\n"
        "print(installed, getattr(kernels, '__file__', None) is not None)"
    )
    installed, has_file = python(code, ROOT).split()
    assert has_file == installed


def test_a_package_named_kernels_wins_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("LayerRepository = 'from the registry'\n")
    code = "from kernels import LayerRepository; print(LayerRepository)"
    assert python(code, ROOT, PYTHONPATH=str(tmp_path)) == "from the registry"


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["repository", "elsewhere"])
def test_the_kernels_import_from_anywhere(cwd):
    # srcfast_kernels imports torch; where it lies is known without running it
    file = python("import importlib.util as u; print(u.find_spec('srcfast_kernels').origin)", cwd)
    assert Path(file) == ROOT / "kernels" / "srcfast_kernels" / "__init__.py"


# The wheel ----------------------------------------------------------------------------------------------------


def copy_sources(folder: Path) -> Path:
    """Building leaves files behind that a later wheel would pick up."""
    source = folder / "source"
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for part in ("srcfast", "kernels", "benchmarks", "csrc", "tests"):
        shutil.copytree(ROOT / part, source / part, ignore=left_out)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    return source


def build_wheel(folder: Path, **environment: str) -> Path:
    source = copy_sources(folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("*.whl")
    return built


def held_by(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built beside a PyTorch that reports CUDA and an nvcc that fails, as one too old for an architecture does."""
    surroundings = tmp_path_factory.mktemp("surroundings")
    (surroundings / "sitecustomize.py").write_text("import torch.version\ntorch.version.cuda = '12.6'\n")
    nvcc = surroundings / "nvcc"
    nvcc.write_text("#!/bin/sh\necho \"nvcc fatal : Unsupported gpu architecture 'compute_100'\" >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return build_wheel(
        tmp_path_factory.mktemp("wheel"),
        PYTHONPATH=str(surroundings),
        PATH=f"{surroundings}:{os.environ['PATH']}",
    )


def test_a_wheel_holds_the_packages_whole_and_nothing_else(wheel):
    expected = {
        f"{name}/{file.relative_to(folder)}"
        for folder, name in PARTS.items()
        for file in folder.rglob("*")
        if file.is_file() and not {"__pycache__", "results"} & set(file.parts) and file.suffix != ".so"
    }
    if shutil.which("c++"):
        expected.add("srcfast_kernels/_native.so")
    assert held_by(wheel) == expected
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_") if shutil.which("c++") else "any"
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")  # the library is for a platform and for any Python
    for needed in (
        "srcfast_kernels/linear_logprob.py",
        "srcfast_benchmarks/linear_logprob.py",
        "srcfast/world/demo.yaml",
        "srcfast/world/assets/base/model.safetensors",
        "srcfast/report/templates/page.html",
        "srcfast/report/templates/style.css",
    ):
        assert needed in expected


def test_without_a_compiler_the_wheel_is_whole_but_for_the_native_library(wheel, tmp_path):
    built = build_wheel(tmp_path, CXX="/bin/false", CC="/bin/false")
    assert held_by(built) == held_by(wheel) - {"srcfast_kernels/_native.so"}
    assert built.name.endswith("-py3-none-any.whl")
    [about] = [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".dist-info/WHEEL")]
    fields = email.message_from_bytes(zipfile.ZipFile(built).read(about))
    assert (fields["Tag"], fields["Root-Is-Purelib"]) == ("py3-none-any", "true")


def test_the_advised_build_asks_for_what_a_build_without_isolation_lacks():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    before, build = native.BUILD.split(" && ")
    assert "--no-build-isolation" in build
    asked = {one.name: one.specifier for one in map(Requirement, re.findall(r"'([^']+)'", before))}
    for requirement in map(Requirement, required):
        assert set(requirement.specifier) <= set(asked[requirement.name])


def test_a_torch_that_cannot_be_imported_costs_the_native_library_alone(tmp_path):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    built = build_wheel(tmp_path, PYTHONPATH=str(tmp_path))
    assert "srcfast_kernels/_native.so" not in held_by(built)
    assert "srcfast_kernels/native.py" in held_by(built)


def described(wheel: Path) -> Message:
    """The metadata of a wheel."""
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


def test_a_wheel_brings_its_license_and_names_it(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    assert described(wheel)["License"] == "Apache-2.0"
    assert described(wheel).get_all("License-File") == ["LICENSE"]


def requirements_by_extra(wheel: Path) -> dict[str, set[str]]:
    """Names of packages; those that are always required are under the empty name."""
    metadata = described(wheel)
    found: dict[str, set[str]] = {extra: set() for extra in ["", *metadata.get_all("Provides-Extra", [])]}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        for extra, names in found.items():
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                names.add(requirement.name)
    return {extra: names if extra == "" else names - found[""] for extra, names in found.items()}


def test_no_extra_asks_for_a_package_whose_build_imports_torch(wheel):
    # pip builds in isolation, without torch, and then ends the whole installation.
    asked = set().union(*requirements_by_extra(wheel).values())
    assert "bitsandbytes" in asked
    assert asked & {"flash-attn", "xformers"} == set()


def test_the_doctor_advises_installations_that_bring_the_package(wheel):
    extras = requirements_by_extra(wheel)
    for name, advice in OPTIONAL.items():
        if name == "triton":
            assert name in extras[""]
        elif (extra := re.search(r"pip install 'srcfast\[(\w+)\]'", advice)) is not None:
            assert name in extras[extra[1]], advice
        else:
            assert re.search(rf"pip install '?{name}\b", advice), advice
    assert "--no-build-isolation" in OPTIONAL["flash-attn"]


def test_an_installed_wheel_runs_without_the_repository(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    code = (
        "import srcfast.cli.app, srcfast.config.load, srcfast_kernels\n"
        "from pathlib import Path\n"
        "from srcfast.report.page import write_report\n"
        f"write_report(Path({str(run)!r}))\n"
        "demo = Path(srcfast.__file__).parent / 'world' / 'demo.yaml'\n"
        "print(srcfast.__file__, srcfast_kernels.__file__, sep='\\n')\n"
        "print(srcfast.config.load.load_config(demo).name)"
    )
    *files, name = python(code, Path("/"), PYTHONPATH=str(tmp_path)).splitlines()
    assert len(files) == 2 and all(Path(file).is_relative_to(tmp_path) for file in files)
    assert name == "demo"
    html = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "--paper" in html and html.count("<section") == 9, "the templates are installed with it"
    assert (tmp_path / "bin" / "srcfast").is_file()


def test_each_embedded_model_is_small():
    for assets in (ROOT / "srcfast" / "world" / "assets").iterdir():
        assert sum(file.stat().st_size for file in assets.iterdir()) <= 8 << 20, assets


# What a command costs before it begins ------------------------------------------------------------------------


def test_help_takes_less_than_a_second_and_no_torch():
    code = (
        "import sys, time\n"
        "from srcfast.cli.app import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit as exit:\n"
        "    print(exit.code, *({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
        "print(time.process_time())"
    )
    spent = []
    for _ in range(2):
        *help_text, left, seconds = python(code, ROOT).splitlines()
        assert any("calibrate" in line for line in help_text)
        assert left == "0", "status, and heavy packages that were imported"
        spent.append(float(seconds))
    # Processor time, which others on the machine stretch less than the clock's; the better of two.
    assert min(spent) < 1.0
