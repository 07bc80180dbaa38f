"""The accounting runs where TensorFlow is not installed."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The package's root may import everything else: it is replaced by an empty one.
CODE = """
import importlib, pkgutil, sys, types
root = types.ModuleType("dp_transcribe")
root.__path__ = [sys.argv[1]]
sys.modules["dp_transcribe"] = root
import dp_transcribe._validate
import dp_transcribe.privacy as privacy
for module in pkgutil.iter_modules(privacy.__path__):
    importlib.import_module(f"dp_transcribe.privacy.{module.name}")
for name in privacy.__all__:
    getattr(privacy, name)
heavy = {"tensorflow", "keras", "tensorflow_privacy"} & set(sys.modules)
print(sorted(heavy))
"""


def test_privacy_imports_no_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(ROOT / "dp_transcribe")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]"
