"""Arrays in a file beside their statement: releases, and what is made of them."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from dp_transcribe import _validate
from dp_transcribe._files import digest_of, discard, replacing
from dp_transcribe.distillation.kernels import Kernel, embed_in_batches
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
        takes_undigested: whether a statement that names no file is read, too, as
            earlier versions wrote it.
    """

    arrays: str
    statement: str
    digest: str
    text: str | None = None
    takes_undigested: bool = False

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
        with replacing(path / self.arrays) as partial:
            np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
            digest = digest_of(partial.read_bytes())
            # In this order a crash leaves arrays without a statement, never another's,
            # and a full disk leaves what stood there.
            discard(path, texts)
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
        undigested = digest is None and self.takes_undigested
        if not undigested and digest != digest_of(content):
            mend = "One of them was overwritten: take those that were saved together."
            expected = f"a folder whose {self.statement} is of its {self.arrays}"
            raise _validate.invalid("folder", str(path), expected, mend)
        with np.load(io.BytesIO(content)) as arrays:
            return statement, dict(arrays)


def probe_of(kernel: Kernel, image_shape: Sequence[int]) -> np.ndarray:
    """The embedding of one public image, always the same: tells kernels apart.

    Args:
        kernel: embeds images.
        image_shape: height, width and number of colours.
    """
    image = np.random.default_rng(0).random((1, *image_shape)).astype(np.float32)
    return embed_in_batches(kernel, image)[0]


# Relative differences of embeddings that are rounding's.
_SAME = 0.02

RELEASED = StatedFile("released.npz", "released.statement.json", "released_sha256")


class KeptRelease:
    """What private data gave, once, as arrays: images are made of it at no cost.

    A dataclass of arrays, and of the `statement` of all of them.

    Attributes:
        probe: float32 `[features]`, the `probe_of` the kernel that it is of: public.

    **Privacy**: as private as the statement says; so is what is made of it.
    """

    probe: np.ndarray
    statement: PrivacyStatement

    def check_kernel(self, kernel: Kernel, image_shape: Sequence[int]) -> None:
        """Refuses a kernel of other embeddings, of which wrong images would be made.

        Args:
            kernel: embeds images as the released arrays want it.
            image_shape: height, width and number of colours.

        Raises:
            ValueError: it embeds otherwise than the kernel of the release.
        """
        probe = probe_of(kernel, image_shape)
        if probe.shape == self.probe.shape:
            change = np.linalg.norm(probe - self.probe)
            if change <= _SAME * np.linalg.norm(self.probe):
                return
            received = "one of other embeddings"
        else:
            received = f"one of {len(self.probe)} features"
        expected = f"a release of these {len(probe)} features"
        mend = "Take the kernel, source, settings and seed that it was released with."
        raise _validate.invalid("released", received, expected, mend)

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
