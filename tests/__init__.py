"""Tests; a package, so that `tests.tiny` is found before a dependency of that name."""
