"""The version of the package, read by `setup.py` and by the package itself."""

__version__ = "0.1.0"
