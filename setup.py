# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
from pathlib import Path

from setuptools import find_packages, setup


OCR = ["rapidocr>=3.10", "onnxruntime>=1.20", "rapidfuzz>=3.9"]
REPORT = ["plotly>=6"]
DEMO = ["gradio>=6"]
EVAL = ["matplotlib>=3.8"]
VIDEO = ["ftfy>=6.1"]  # diffusers' WanImageToVideoPipeline
# The browser itself is the system's, or comes by `playwright install chromium`; tests that need one skip without it.
BROWSER = ["playwright>=1.50"]
EXTRAS = {
    "test": [
        *("pytest>=8", "pytest-xdist>=3.6", "scipy>=1.11", "hypothesis>=6.100"),
        *(*OCR, *REPORT, *DEMO, *EVAL, *VIDEO, *BROWSER),
    ],
    "report": REPORT,
    "demo": DEMO,
    "ocr": OCR,
    "video": VIDEO,
    "eval": EVAL,
    "quantization": ["bitsandbytes>=0.48"],
    "docs": ["mkdocs>=1.6,<2", "pymdown-extensions>=10.14"],
}

setup(
    name="rdm_trl",
    version="0.1.0.dev0",
    description="Few-step diffusion distillation in the style of TRL: distribution matching as a reward",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["rdm_trl", "rdm_trl.*"]),
    package_data={
        "rdm_trl.demo": ["*.safetensors", "*.json", "*.md", "classifier/*", "pipeline/*", "pipeline/*/*", "space/*"],
        "rdm_trl.saving": ["*.html"],
    },
    python_requires=">=3.11",
    # The oldest that were tried, and why: tests/oldest.txt. torch 2.11 has run the main job on a GPU.
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.41",
        "trl>=1.14",
        "transformers>=5.23",
        "accelerate>=1.10.1",
        "peft>=0.21",
        "datasets>=4.7",
        "huggingface_hub>=1.32",
        "psutil",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rdm-trl = rdm_trl.cli:main"]},
)
