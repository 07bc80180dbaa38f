"""The one place where errors for plain values are worded.

Every function takes the argument's name and value, returns the value in the
type the caller works with, or raises a `ValueError` phrased the way Keras does:
what was wrong, what was expected, what was received, and how to mend it. Nothing
here looks at private data.
"""

import math
import numbers
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def invalid(name: str, value: Any, expected: str, mend: str = "") -> ValueError:
    """Words the error for one argument; the caller raises it.

    Args:
        name: the argument as the user wrote it.
        value: what was received.
        expected: what was expected, without the full stop.
        mend: one sentence on how to put it right.

    Returns:
        The error, not yet raised.
    """
    text = (
        f"Invalid value for argument `{name}`. Expected {expected}. "
        f"Received: {name}={value!r}."
    )
    return ValueError(f"{text} {mend}".rstrip())


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def positive_finite(name: str, value: Any, mend: str = "") -> float:
    """Checks a number above zero that is neither NaN nor infinite."""
    if not _is_real(value) or not math.isfinite(value) or value <= 0:
        raise invalid(name, value, "a finite number greater than 0", mend)
    return float(value)


def non_negative(name: str, value: Any, mend: str = "") -> float:
    """Checks a finite number that is 0 or more."""
    if not _is_real(value) or not math.isfinite(value) or value < 0:
        raise invalid(name, value, "a finite number that is 0 or more", mend)
    return float(value)


def fraction_open(name: str, value: Any, mend: str = "") -> float:
    """Checks a number strictly between 0 and 1, such as a delta."""
    if not _is_real(value) or not 0 < value < 1:
        raise invalid(name, value, "a number strictly between 0 and 1", mend)
    return float(value)


def probability(name: str, value: Any, mend: str = "") -> float:
    """Checks a number between 0 and 1, both included."""
    if not _is_real(value) or not 0 <= value <= 1:
        raise invalid(name, value, "a number between 0 and 1", mend)
    return float(value)


def positive_int(name: str, value: Any, mend: str = "") -> int:
    """Checks a whole number of 1 or more."""
    if not _is_int(value) or value < 1:
        raise invalid(name, value, "a whole number of 1 or more", mend)
    return int(value)


def non_negative_int(name: str, value: Any, mend: str = "") -> int:
    """Checks a whole number of 0 or more."""
    if not _is_int(value) or value < 0:
        raise invalid(name, value, "a whole number of 0 or more", mend)
    return int(value)


def in_range(name: str, value: Any, low: int, high: int, mend: str = "") -> int:
    """Checks a whole number from `low` to `high`, both included.

    Example: the number of candidate classes k, from 1 to the number of classes.
    """
    if not _is_int(value) or not low <= value <= high:
        raise invalid(name, value, f"a whole number from {low} to {high}", mend)
    return int(value)


def num_classes(name: str, value: Any, mend: str = "") -> int:
    """Checks a number of classes: a whole number of 2 or more."""
    if not _is_int(value) or value < 2:
        raise invalid(name, value, "a whole number of 2 or more", mend)
    return int(value)


def pixel_range(name: str, value: Any) -> tuple[float, float]:
    """Checks the lowest and highest value of a pixel, finite and different."""
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise invalid(name, value, "(low, high), finite, with low < high")
    return low, high


def optional_seed(name: str, value: Any) -> int | None:
    """Checks a seed: None (secret, from the operating system) or an integer.

    A negative or fractional seed is refused rather than folded into range, since
    the value is written into the privacy statement.
    """
    if value is None:
        return None
    if not _is_int(value) or not 0 <= value < 2**63:
        mend = "Leave it out (None) to draw the noise from secret entropy."
        raise invalid(name, value, "None or a whole number from 0 to 2**63 - 1", mend)
    return int(value)


def one_of(name: str, value: Any, choices: Iterable[Any], mend: str = "") -> Any:
    """Checks that a value is one of a few choices."""
    options = tuple(choices)
    if not any(type(value) is type(o) and value == o for o in options):
        listed = ", ".join(repr(option) for option in options)
        raise invalid(name, value, f"one of {listed}", mend)
    return value


def instance_of(
    name: str, value: Any, kinds: type | tuple[type, ...], mend: str = ""
) -> Any:
    """Checks that a value is of one of the given types."""
    if not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        listed = " or ".join(f"`{kind.__name__}`" for kind in kinds)
        raise invalid(name, value, f"an instance of {listed}", mend)
    return value


def optional_callable(name: str, value: Any) -> Any:
    """Checks that a value can be called, or is None."""
    if value is not None and not callable(value):
        raise invalid(name, value, "None or a function")
    return value


def written_range(name: str, text: str | None) -> tuple[float, float]:
    """Checks a range of pixels as a flag has it, `low,high`; None is 0 to 1."""
    try:
        low, high = map(float, ("0,1" if text is None else text).split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low < high < math.inf:
        raise invalid(name, text, "low,high with low < high, such as 0,255")
    return low, high


def writable_dir(name: str, path: str | os.PathLike[str]) -> Path:
    """Checks that a folder can be written to, creating it where it is missing.

    A file is written and removed, since permission bits do not tell the truth for
    an administrator or on a read-only file system.

    Returns:
        The folder as a `Path`.

    Raises:
        ValueError: the folder cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        mend = f"Choose a folder you may write to ({error.strerror or error})."
        raise invalid(name, str(path), "a writable folder", mend) from error
    return folder


def writable_file(name: str, path: str | os.PathLike[str]) -> Path:
    """Checks that a file can be written, creating its folder where it is missing.

    Returns:
        The file as a `Path`; it is left as it was.

    Raises:
        ValueError: it is a folder, or cannot be written.
    """
    file = Path(path)
    writable_dir(name, file.parent)
    if not file.exists():
        return file
    try:
        file.open("ab").close()
    except OSError as error:
        mend = f"Choose a file you may write to ({error.strerror or error})."
        raise invalid(name, str(path), "a writable file", mend) from error
    return file
