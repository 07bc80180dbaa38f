"""Arrays in a file beside their statement: releases, and what is made of them."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import Self

import numpy as np

from dp_transcribe import _validate
from dp_transcribe._files import digest_of, discard, replacing
from dp_transcribe.privacy.statement import (
    PrivacyStatement,
    split_digest,
    with_digest,
)


@dataclasses.dataclass(frozen=True)
class StatedFile:
    """Names of a file of arrays and of what stands beside it.

    Attributes:
        arrays: ends in `.npz`.
        statement: ends in `.json`; names the SHA-256 of the file that it is of.
        digest: under what name.
        text: the statement in prose; None for none.
    """

    arrays: str
    statement: str
    digest: str
    text: str | None = None

    def write(
        self,
        folder: str | os.PathLike[str],
        statement: PrivacyStatement,
        **arrays: np.ndarray | int,
    ) -> None:
        """Writes arrays and statement.

        Args:
            folder: made if it is missing.
            statement: of the arrays.
            **arrays: by their names.

        Raises:
            ValueError: the folder cannot be written to.
        """
        path = _validate.writable_dir("folder", folder)
        texts = [self.statement] if self.text is None else [self.statement, self.text]
        # In this order a crash leaves arrays without a statement, never another's.
        discard(path, texts)
        with replacing(path / self.arrays) as partial:
            np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
            digest = digest_of(partial.read_bytes())
        if self.text is not None:
            (path / self.text).write_text(statement.to_text(), encoding="utf-8")
        stated = with_digest(statement, self.digest, digest)
        (path / self.statement).write_text(stated.to_json(), encoding="utf-8")

    def read(
        self, folder: str | os.PathLike[str]
    ) -> tuple[PrivacyStatement, dict[str, np.ndarray]]:
        """Reads what `write` wrote.

        Args:
            folder: the folder.

        Returns:
            The statement, and the arrays by their names.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the statement is malformed or of other arrays.
        """
        path = Path(folder)
        text = (path / self.statement).read_text(encoding="utf-8")
        content = (path / self.arrays).read_bytes()
        statement, digest = split_digest(PrivacyStatement.from_json(text), self.digest)
        if digest not in (None, digest_of(content)):
            mend = "One of them was overwritten: take those that were saved together."
            expected = f"a folder whose {self.statement} is of its {self.arrays}"
            raise _validate.invalid("folder", str(path), expected, mend)
        with np.load(io.BytesIO(content)) as arrays:
            return statement, dict(arrays)


RELEASED = StatedFile("released.npz", "released.statement.json", "released_sha256")


class KeptRelease:
    """What private data gave, once, as arrays: images are made of it at no cost.

    A dataclass of arrays, and of the `statement` of all of them.

    **Privacy**: as private as the statement says; so is what is made of it.
    """

    statement: PrivacyStatement

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `released.npz` and `released.statement.json`.

        Args:
            folder: made if it is missing.

        Raises:
            ValueError: the folder cannot be written to.
        """
        arrays = {name: getattr(self, name) for name in self._names()}
        RELEASED.write(folder, self.statement, **arrays)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Args:
            folder: the folder.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the statement is malformed or of other arrays, or what was
                released is of another kind.
        """
        statement, arrays = RELEASED.read(folder)
        if sorted(arrays) != sorted(cls._names()):
            expected = f"a folder with a {cls.__name__}"
            received = f"{folder}, with {', '.join(sorted(arrays))}"
            raise _validate.invalid("folder", received, expected)
        return cls(**arrays, statement=statement)  # type: ignore[call-arg]

    @classmethod
    def _names(cls) -> list[str]:
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return [field.name for field in fields if field.name != "statement"]
