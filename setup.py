"""Packaging: `srcfast`, from kernels/ `srcfast_kernels` (kernels/ itself is no package: see tests/packaging), from benchmarks/
`srcfast_benchmarks`."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "report": ["matplotlib>=3.8"],
    "data": ["easy-vqa>=1.0"],
    "gpu": ["flash-attn>=2.8", "xformers>=0.0.35", "bitsandbytes>=0.49"],
    "track": ["tensorboard>=2.16"],
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
        "easy-vqa>=1.0",
        "matplotlib>=3.8",
        "setuptools>=77",  # a test builds the wheel
    ],
}

setup(
    name="srcfast",
    version="0.1.0",
    description="Self-Rationale Calibration of vision-language models on one machine, fast and lean",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["srcfast", "srcfast.*"]), "srcfast_kernels", "srcfast_benchmarks"],
    package_dir={
        "srcfast": "srcfast",
        "srcfast_kernels": "kernels/srcfast_kernels",
        "srcfast_benchmarks": "benchmarks",
    },
    package_data={"srcfast": ["world/*.yaml", "world/assets/*/*"], "srcfast_benchmarks": ["*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",  # what is tested; a looser bound pulls gigabytes of another CUDA
        'triton>=3.6,<3.10; sys_platform == "linux"',
        "transformers>=5,<6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11",
        "pydantic>=2.8",
        "typer>=0.12",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["srcfast = srcfast.cli:app"]},
)
