"""What a `.keras` file holds of a transcriber: its arguments and its state."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np

from dp_transcribe import _validate
from dp_transcribe._files import replacing
from dp_transcribe.ensembles import TeacherEnsemble
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
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.queries import FreshQueries, QueryPool
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber.answer_learning import AnswerLearner
from dp_transcribe.transcriber.compatibility import check_ledger, digest_of_parts
from dp_transcribe.transcriber.rehearsal import check_checkpoint_path
from dp_transcribe.workers import is_chief

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

_PLAIN = (
    "public_share",
    "student_updates",
    "generator_updates",
    "generator_batch_size",
    "replay_size",
    "replay_batch_size",
    "candidates_per_query",
    "balance_classes",
    "uniform_prior_queries",
    "rests",
    "generator_covered",
    "schedule",
    "seed",
)
_OF_KERAS = ("student", "second_student", "generator", "public_prior")
_OF_FIELDS = ("mechanism", "queries", "objective")
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


def config_of_arguments(owner: DPTranscriber) -> dict[str, Any]:
    """The constructor's arguments of a transcriber, as a config.

    Raises:
        ValueError: the teacher is not a Keras model, so it has no config.
    """
    serialize = keras.saving.serialize_keras_object
    return {
        **{name: getattr(owner, name) for name in _PLAIN},
        **{name: serialize(getattr(owner, name)) for name in _OF_KERAS},
        **{name: _config_of(getattr(owner, name)) for name in _OF_FIELDS},
        "teacher": owner.teacher.get_config(),
    }


def arguments_from(config: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `config_of_arguments`; other entries stay as they are."""
    arguments = dict(config)
    for name in _OF_KERAS:
        arguments[name] = keras.saving.deserialize_keras_object(config[name])
    for name in _OF_FIELDS:
        arguments[name] = _made_from(config[name])
    kind = TeacherEnsemble if "member" in config["teacher"] else Teacher
    teacher = arguments["teacher"] = kind.from_config(config["teacher"])
    # Fresh weights may equal the student's, which would be taken for a copy.
    teacher.set_weights([np.zeros_like(w) for w in teacher.get_weights()])
    return arguments


def write_state(owner: DPTranscriber, store: Any) -> None:
    """Writes ledger, pool count, replay and the teacher's weights.

    Raises:
        RuntimeError: the ledger is not that of the weights.
    """
    check_ledger(owner)
    store["ledger"] = _as_bytes(owner.ledger.to_json())
    state = {
        "pool_number": owner.budget.pool_number,
        "delta": owner.budget.delta,
        "accountant": owner.budget.accountant,
        "mechanism": _config_of(owner.mechanism),
        "seed": owner.seed,
        "weights": digest_of_parts(owner),
    }
    store["state"] = _as_bytes(json.dumps(state))
    for index, weight in enumerate(owner.teacher.get_weights()):
        store[f"teacher_{index}"] = weight
    learner = owner._run.learner
    if isinstance(learner, AnswerLearner) and not owner._run.leaves_out_replay:
        store["written"] = learner.replay_written()
        for index, (codes, released) in enumerate(learner.replay_pieces()):
            store[f"codes_{index}"], store[f"released_{index}"] = codes, released


def check_state(store: Any) -> None:
    """Refuses what `write_state` did not write.

    Raises:
        ValueError: it holds a replay in a form of before, which would be lost.
    """
    if "replay_0" in store.keys():
        raise ValueError(
            "The file holds its replay as an earlier version of this library wrote "
            "it, in one piece; expected pieces. Load it with that version, or "
            "start anew."
        )
    if "weights" not in json.loads(_as_text(store["state"])):
        raise ValueError(
            "The file does not say which weights its ledger is of; expected what this "
            "version of the library wrote. Load it with the earlier one, or start anew."
        )


def read_state(owner: DPTranscriber, store: Any) -> None:
    """Reads what `write_state` wrote; the run before it is over.

    Raises:
        ValueError: it is of another mechanism.
    """
    state, budget = json.loads(_as_text(store["state"])), owner.budget
    written, own = state["mechanism"]["kind"], type(owner.mechanism).__name__
    if written != own:
        expected = f"a file of a transcriber with {own}"
        raise _validate.invalid("mechanism", written, expected)
    budget.resume(
        Ledger.from_json(_as_text(store["ledger"])),
        _made_from(state["mechanism"]),
        pool_number=state["pool_number"],
    )
    budget.delta, budget.accountant = state["delta"], state["accountant"]
    owner.noise.seed = state["seed"]
    owner._run.after_load()
    weights = list(_numbered(store, "teacher"))
    if weights:
        owner.teacher.set_weights(weights)
    if "written" in store.keys():
        pieces = zip(
            _numbered(store, "codes"), _numbered(store, "released"), strict=True
        )
        learner = cast(AnswerLearner, owner._run.make_learner())
        learner.set_replay(np.asarray(store["written"]), pieces)
    # Keras loads the parts afterwards, and goes on with others if one fails.
    owner._run.loaded_digest = state["weights"]


def write_checkpoint(owner: DPTranscriber, path: str | os.PathLike[str]) -> None:
    """Saves to a file that is never seen half written; the first worker alone does.

    The others take part, since replays are gathered, and keep nothing.
    """
    _validate.instance_of("path", path, (str, os.PathLike))
    check_checkpoint_path("path", os.fspath(path))
    path = Path(path)
    if is_chief(owner.distribute_strategy):
        _validate.writable_dir("path", path.parent)
        with replacing(path, secret=True) as partial:
            _save_by_disk(owner, partial)
    else:
        with tempfile.TemporaryDirectory() as folder:
            owner.save(Path(folder) / path.name)


def _save_by_disk(owner: DPTranscriber, path: Path) -> None:
    """As Keras' `save`; a replay never is in memory a second time."""
    run = owner._run
    run.leaves_out_replay = was_left_out = isinstance(run.learner, AnswerLearner)
    try:
        owner.save(path, overwrite=True)
    finally:
        run.leaves_out_replay = False
    if was_left_out:
        _replace_weights(path, owner)


def _replace_weights(path: Path, model: keras.Model) -> None:
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


def _config_of(value: Any) -> dict[str, Any]:
    """The config of a mechanism, a sampler of queries or an objective."""
    if isinstance(value, Mechanism):
        fields = value.get_config()
    else:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {"kind": type(value).__name__, "fields": fields}


def _made_from(config: dict[str, Any]) -> Any:
    """The opposite of `_config_of`."""
    kind, fields = _KINDS[config["kind"]], config["fields"]
    return kind.from_config(fields) if issubclass(kind, Mechanism) else kind(**fields)


def _as_bytes(text: str) -> np.ndarray:
    """A text as the array that Keras' files can hold."""
    return np.frombuffer(text.encode(), np.uint8)


def _as_text(values: Any) -> str:
    """The opposite of `_as_bytes`."""
    return np.asarray(values, np.uint8).tobytes().decode()


def _numbered(store: Any, prefix: str) -> Iterator[np.ndarray]:
    """The arrays stored as `prefix_0`, `prefix_1` and so on, read one by one."""
    index = 0
    while f"{prefix}_{index}" in store.keys():
        yield np.asarray(store[f"{prefix}_{index}"])
        index += 1
