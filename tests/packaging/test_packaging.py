"""The package as users install it: names that must not be shadowed, what a wheel holds, what an import costs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_kernels_folder_shadows_no_package_from_the_repository_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # With PyPI's `kernels` installed that one must win; without it this is a bare namespace, which has no file.
    code = (
        "import importlib.metadata as m, importlib.util as u\n"
        "installed = any(d.metadata['Name'] == 'kernels' for d in m.distributions())\n"
        "spec = u.find_spec('kernels')\n"
        "print(installed, spec is not None and spec.origin is not None)"
    )
    installed, has_file = python(code, ROOT).split()
    assert has_file == installed


def test_kernels_of_pypi_win_over_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("LayerRepository = 'from the registry'\n")
    code = "from kernels import LayerRepository; import srcfast_kernels; print(LayerRepository)"
    assert python(code, ROOT, PYTHONPATH=str(tmp_path)) == "from the registry"


@pytest.mark.parametrize("cwd", [ROOT, Path("/")])
def test_the_kernels_import_from_anywhere(cwd):
    file = python("import srcfast_kernels; print(srcfast_kernels.__file__)", cwd)
    assert Path(file) == ROOT / "kernels" / "srcfast_kernels" / "__init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind that a later wheel would pick up
    for part in ("srcfast", "kernels"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_code_and_embedded_models_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "srcfast_kernels/__init__.py",
        "srcfast/world/demo.yaml",
        "srcfast/world/assets/base/model.safetensors",
        "srcfast/world/assets/scorer/model.safetensors",
        "srcfast/report/page.py",
    ):
        assert needed in names
    roots = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert roots == {"srcfast", "srcfast_kernels"}


def test_an_installed_wheel_imports_without_the_repository(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    code = "import srcfast.loading, srcfast_kernels; print(srcfast.loading.__file__); print(srcfast_kernels.__file__)"
    for file in python(code, Path("/"), PYTHONPATH=str(tmp_path)).splitlines():
        assert Path(file).is_relative_to(tmp_path)


def test_the_embedded_base_is_small():
    assets = ROOT / "srcfast" / "world" / "assets" / "base"
    assert sum(file.stat().st_size for file in assets.iterdir()) <= 8 << 20


def test_help_needs_no_torch():
    code = "import sys, srcfast.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert python(code, ROOT) == "[]"
