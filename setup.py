"""Packaging of tf_lowbit: `pip install .` or `pip install -e '.[all]'`."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# TF-MOT 0.8 works on Keras 2 only, which is tf-keras; tf-keras and tensorflow are
# released together, and tensorflow itself brings Keras 3 along.
INSTALL_REQUIRES = [
    "absl-py>=1.2,<2",
    "flatbuffers>=24,<26",
    "h5py>=3.11,<4",
    "numpy>=2.0,<3",
    "rich>=13,<16",
    "tensorflow>=2.21,<2.22",
    "tensorflow-model-optimization>=0.8.1,<0.9",
    "tf-keras>=2.21,<2.22",
]
EXTRAS = {
    # Runs TFLite files in place of TensorFlow's interpreter, which is to go.
    "litert": ["ai-edge-litert>=2.1,<3"],
    # What the example programs log with; TensorFlow 2.21 no longer brings it.
    "examples": ["tensorboard>=2.20,<2.22"],
    # The tables and plots of the accuracy benchmark.
    "benchmarks": [
        "matplotlib>=3.9,<4",
        "scipy>=1.13,<2",
        "tabulate>=0.9,<1",
    ],
    "datasets": ["scikit-learn>=1.5,<2", "tensorflow-datasets>=4.9.9,<5"],
    # Runs files for TFLite Micro; it is released by the day, as versions of 0.dev.
    "micro": ["tflite-micro>=0.dev20261023,<1"],
    # Writes QONNX files, and runs them.
    "qonnx": ["onnx>=1.19,<2", "onnxruntime>=1.23,<2", "qonnx>=1.0,<2"],
    # The page of `report`.
    "report": ["jinja2>=3.1,<4", "matplotlib>=3.9,<4"],
    # The solver of `allocate_bits`.
    "search": ["scipy>=1.13,<2"],
    # `make docs`.
    "docs": ["furo>=2025.7,<2027", "myst-parser>=5,<6", "sphinx>=9,<10"],
    "dev": [
        "hypothesis>=6.100,<7",
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "ruff==0.17.5",
    ],
}
EXTRAS["all"] = sorted(set().union(*EXTRAS.values()))


def read_version() -> str:
    """Returns `__version__` from version.py without importing the package."""
    path = ROOT / "tf_lowbit" / "version.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{path} must assign __version__ = '<version>'.")


def read_long_description() -> str:
    """Returns the README, or nothing where a partial checkout lacks it."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="tf_lowbit",
    version=read_version(),
    description="Multi-stage training of low-bit Keras networks on TF-MOT",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["tf_lowbit", "tf_lowbit.*"]),
    package_data={"tf_lowbit.reporting": ["*.jinja"]},
    # 3.11 is the version the tests run on; TensorFlow 2.21 has no wheel above 3.13.
    python_requires=">=3.11,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
