"""Packaging of `dp_transcribe`.

Everything that decides a result is pinned here, the packages behind it in
`constraints.txt`: install with `pip install -c constraints.txt -e .`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "dp_transcribe" / "_version.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)[1]

# Left to itself, pip puts TensorFlow Privacy 0.7.3 next to current TensorFlow, and
# mlxtend 0.25 moves NumPy to a major version TensorFlow Privacy does not accept.
REQUIRES = [
    "tensorflow==2.21.*",
    "keras==3.15.*",
    "tensorflow-privacy==0.9.0; python_version < '3.12'",
    "dp-accounting==0.4.3",
    "numpy==1.26.4",
    "scipy>=1.11,<1.17",  # kymatio 0.3.0 (scattering) stops importing at 1.17
    "scikit-learn>=1.5,<2",  # membership inference
    "absl-py==1.4.0",
    "tensorflow-datasets==4.9.10",
    # tensorflow-datasets imports it on Python 3.11 without declaring it.
    "importlib_resources>=6,<8",
    "matplotlib>=3.8,<4",
]
EXTRAS = {
    "gpu": ["tensorflow[and-cuda]==2.21.*"],
    "examples": ["mlxtend==0.23.4"],
    # The client of TensorFlow Serving's gRPC interface (serving/README.md).
    "serving": ["tensorflow-serving-api==2.21.*"],
    # The converters and runtimes that load an exported student in the tests.
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "mlxtend==0.23.4",
        "tf2onnx==1.17.0",
        "onnxruntime>=1.22,<2",
        "openvino>=2025,<2027",
        "tensorflow-serving-api==2.21.*",
        "kymatio==0.3.0",  # the reference of the scattering transform
    ],
    "dev": [
        "ruff>=0.12,<1",
        "mypy>=1.15,<3",
        "import-linter>=2.3,<3",
        "pre-commit>=4,<5",
    ],
    "docs": ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"],
}

setup(
    name="dp-transcribe",
    version=VERSION,
    description=(
        "Turns a pretrained Keras classifier into a student that is safe to release, "
        "by data-free distillation under differential privacy."
    ),
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["dp_transcribe", "dp_transcribe.*"]),
    package_data={"dp_transcribe": ["py.typed"]},
    # TensorFlow Privacy's wheel refuses 3.12; TensorFlow's and NumPy's pins, 3.10.
    python_requires=">=3.11,<3.12",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
)
