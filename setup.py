"""Packaging: the library; `[test]` adds its tests, `[cuda]` and `[tpu]` those devices."""

from setuptools import find_packages, setup

setup(
    name="dmd_jax",
    version="0.1.0",
    description="Distribution Matching Distillation in JAX: few-step students of diffusion",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dmd_jax", "dmd_jax.*"]),
    include_package_data=True,
    package_data={
        "dmd_jax": ["py.typed", "assets/*", "data/*.npz", "data/*.md", "pipelines/*.html"]
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "einops>=0.8",
        "jaxtyping>=0.3",  # shapes in signatures; the tests check them, with beartype
        "numpy>=2",
        "absl-py>=2.1",
        "ml_collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6",  # tensorflow-datasets imports it and does not declare it
        "array_record>=0.8",
        "grain>=0.2.18",
        "clu>=0.0.12",
        # clu's TensorBoard writers need both and declare neither.
        "tensorboard>=2.21",
        "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "safetensors>=0.8",
        "scipy>=1.17",
        "etils>=1.10",
        "pillow>=12",
        "matplotlib>=3.10",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # The TPU's compiler, libtpu, for dmd_jax.plan: the version that belongs to this jax.
        "plan": ["jax[tpu]>=0.10.2"],
        # Videos, prompts and the hub: dmd_jax.sample and dmd_jax.embed on Wan's checkpoints.
        "wan": [
            "av>=14",
            "ftfy>=6.2",
            "tokenizers>=0.21",
            "sentencepiece>=0.2",
            "huggingface_hub>=0.30",
        ],
        "lmdb": ["lmdb>=1.4"],  # the files of Self-Forcing that dmd_jax.ode_pairs converts
        # The page of dmd_jax.stream; [wan] for its downloads as MP4.
        "stream": ["websockets>=15"],
        "wandb": ["wandb>=0.31"],
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "beartype>=0.20",
            "websockets>=15",
            "zstandard>=0.23",  # JAX packs what it compiles with it, in a seventh of zlib's time
        ],
    },
)
