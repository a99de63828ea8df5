"""Installs megasora. Exact pins that are known to work together stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "torch>=2.11,<2.14",
    "megatron-core==0.16.1",
    "psutil",  # megatron's dist_checkpointing imports it without declaring it
    "numpy>=2",
    "einops",
    "jaxtyping",
    "safetensors",
    "transformers>=5",
    "diffusers>=0.36",
    "sentencepiece",
    "protobuf",
    "av>=16",
    "Pillow",
    "pyarrow",
    "tensorboard",
    "tyro>=1",
    "cattrs",
    "rich",
    "PyYAML",
]
DALI = ["nvidia-dali-cuda130==2.4.0"]
CURATION = [
    "duckdb>=1.4",
    "faiss-cpu",
    "Jinja2",
    "onnxruntime",
    "opencv-python-headless",  # never beside opencv-python: both install cv2
    "pdqhash",
    "pebble>=5",
    "rapidocr>=3.10,<4",
    "scenedetect-headless>=0.7",
]
RAY = ["ray>=2.40"]
SERVE = ["gradio>=6,<7"]
EVALUATE = ["scikit-image>=0.25"]
EXTRAS = {
    "data": [*DALI, *CURATION],
    "ray": RAY,
    "evaluate": EVALUATE,
    "serve": SERVE,
    "gpu": [*DALI, "transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
    "flash": ["flash-attn==2.8.3"],
    "dev": [
        *DALI,
        *CURATION,
        *RAY,
        *SERVE,
        *EVALUATE,
        "peft",  # writes the adapters that tests merge
        "accelerate",
        "torchmetrics",  # its parts of LPIPS and the published lin layers, which tests compare with
        "playwright",  # drives Debian's chromium; without one the test of the page is skipped
        "webdataset",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "beartype",
        "import-linter",
        "ruff",
        "mypy",
        "types-PyYAML",
    ],
}

setup(
    name="megasora",
    version="0.1.0",
    description="Megatron-style 3D-parallel training, conversion and scaling of the Open-Sora 2.0 MMDiT",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megasora", "megasora.*"]),
    package_data={"megasora": ["py.typed", "curation/*.j2", "evaluation/*.html", "evaluation/autoencoders/*.html", "scaling/study/*.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megasora = megasora.cli:main"]},
)
