"""Tables as vectors in public bounds, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from dp_transcribe import _validate


@dataclasses.dataclass(frozen=True)
class NumericColumn:
    """A column of numbers.

    Attributes:
        name: of the column.
        low: smallest value, a public fact: never the smallest one in the data.
        high: largest value, a public fact as well.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Checks the bounds."""
        if not -np.inf < self.low < self.high < np.inf:
            expected = f"finite, above low={self.low!r}"
            mend = "Take bounds that are known without looking at the data."
            raise _validate.invalid("high", self.high, expected, mend)

    @property
    def width(self) -> int:
        """Entries of the vector that this column fills."""
        return 1

    def encode(self, values: Sequence[float]) -> np.ndarray:
        """Maps the bounds to -1 and 1; clips, and puts 0 where a value is missing.

        Raises:
            ValueError: the values are no numbers. The message does not quote them: they
                are private.
        """
        try:
            numbers = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            mend = "Put NaN where a value is missing."
            raise _validate.invalid(
                self.name, "(withheld: private)", "numbers", mend
            ) from None
        scaled = 2.0 * (numbers - self.low) / (self.high - self.low) - 1.0
        return np.nan_to_num(np.clip(scaled, -1.0, 1.0))[:, None]

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Numbers within the bounds."""
        unit = (np.clip(vectors[:, 0], -1.0, 1.0) + 1.0) / 2.0
        return self.low + unit * (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class CategoricalColumn:
    """A column of categories.

    Attributes:
        name: of the column.
        categories: all that there can be, a public fact.
    """

    name: str
    categories: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        """Checks that there are categories and none twice."""
        if not self.categories or len(set(self.categories)) != len(self.categories):
            expected = "one or more categories, none twice"
            raise _validate.invalid("categories", self.categories, expected)

    @property
    def width(self) -> int:
        """Entries of the vector that this column fills."""
        return len(self.categories)

    def encode(self, values: Sequence[Hashable]) -> np.ndarray:
        """One-hot vectors; all zero for what is no category."""
        known = np.empty(len(self.categories), dtype=object)
        known[:] = self.categories
        column = np.asarray(values, dtype=object)
        return (column[:, None] == known[None]).astype(np.float64)

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """The most likely categories."""
        known = np.empty(len(self.categories), dtype=object)
        known[:] = self.categories
        return known[vectors.argmax(axis=1)]


Column = NumericColumn | CategoricalColumn


@dataclasses.dataclass(frozen=True)
class TableEncoder:
    """Turns rows of a table into vectors for a kernel on vectors.

    Attributes:
        columns: the columns in order.

    **Privacy**: each row is encoded by itself with public bounds and categories;
    nothing is fitted to the table.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        """Checks that there are columns and no name twice."""
        names = [column.name for column in self.columns]
        if not names or len(set(names)) != len(names):
            raise _validate.invalid("columns", names, "columns of different names")

    @property
    def width(self) -> int:
        """Length of a vector."""
        return sum(column.width for column in self.columns)

    def encode(self, table: Mapping[str, Sequence]) -> np.ndarray:
        """Encodes a table.

        Args:
            table: values by column name, such as a dictionary or a data frame.

        Returns:
            float32 `[rows, width]` with entries from -1 to 1.

        Raises:
            ValueError: a column is missing or holds no numbers, or columns are of
                different lengths.
        """
        missing = [c.name for c in self.columns if c.name not in table]
        if missing:
            raise _validate.invalid("table", missing, "a table with these columns")
        shapes = {np.shape(table[c.name]) for c in self.columns}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            expected = "a table whose columns have one length"
            raise _validate.invalid("table", sorted(shapes), expected)
        parts = [column.encode(table[column.name]) for column in self.columns]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def decode(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """Reads vectors, such as distilled ones, as a table.

        Args:
            vectors: float `[rows, width]`.

        Returns:
            Values by column name, numbers within their bounds.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            expected = f"vectors of shape (rows, {self.width})"
            raise _validate.invalid("vectors", vectors.shape, expected)
        ends = np.cumsum([column.width for column in self.columns])[:-1]
        parts = np.split(vectors, ends, axis=1)
        pairs = zip(self.columns, parts, strict=True)
        return {column.name: column.decode(part) for column, part in pairs}
