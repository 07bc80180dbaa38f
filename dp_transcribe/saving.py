"""Parts of a transcriber as configs, and what else a `.keras` file holds of it."""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.mechanisms.ensemble_gradient import EnsembleGradient
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.mechanisms.noisy_answer import NoisyAnswer
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.mechanisms.output_gradient import NormalizedOutputGradient
from dp_transcribe.mechanisms.randomized_response import (
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.mechanisms.weight_gradient import ClippedGradient, NormalizedGradient
from dp_transcribe.queries import FreshQueries, QueryPool

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ClippedGradient,
        EnsembleGradient,
        Inherited,
        NormalizedGradient,
        NormalizedOutputGradient,
        NoisyAnswer,
        NoisyVotes,
        RandomizedResponse,
        SelectiveRandomizedResponse,
        FreshQueries,
        QueryPool,
        GeneratorObjective,
    )
}

# What Keras calls the weights in a `.keras` file.
_WEIGHTS = "model.weights.h5"


def replace_weights(path: Path, model: keras.Model) -> None:
    """Writes the weights of a `.keras` file anew, through a file on disk.

    Keras itself holds all of them in memory before it writes the first.

    Args:
        path: of the file, which keeps its permissions. For a while there is a second
            copy of the weights beside it.
        model: what `path` was saved from.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        weights = Path(folder) / _WEIGHTS
        model.save_weights(weights)
        with zipfile.ZipFile(path) as before:
            infos = [i for i in before.infolist() if i.filename != _WEIGHTS]
            others = [(info, before.read(info)) for info in infos]
        with zipfile.ZipFile(path, "w") as archive:
            for info, content in others:
                archive.writestr(info, content)
            archive.write(weights, _WEIGHTS)


def config_of(value: Any) -> dict[str, Any]:
    """The config of a mechanism, a sampler of queries or an objective."""
    if isinstance(value, Mechanism):
        fields = value.get_config()
    else:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"kind": type(value).__name__, "fields": fields}


def made_from(config: dict[str, Any]) -> Any:
    """The opposite of `config_of`."""
    kind, fields = _KINDS[config["kind"]], config["fields"]
    return kind.from_config(fields) if issubclass(kind, Mechanism) else kind(**fields)


def as_bytes(text: str) -> np.ndarray:
    """A text as the array that Keras' files can hold."""
    return np.frombuffer(text.encode(), np.uint8)


def as_text(values: Any) -> str:
    """The opposite of `as_bytes`."""
    return np.asarray(values, np.uint8).tobytes().decode()


def numbered(store: Any, prefix: str) -> Iterator[np.ndarray]:
    """The arrays stored as `prefix_0`, `prefix_1` and so on, read one by one."""
    index = 0
    while f"{prefix}_{index}" in store.keys():
        yield np.asarray(store[f"{prefix}_{index}"])
        index += 1
