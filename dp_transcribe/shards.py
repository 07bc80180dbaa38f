"""Training one teacher on each shard of the private records, resumably."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe._files import digest_of, replacing
from dp_transcribe.ensembles import ShardPlan, TeacherEnsemble
from dp_transcribe.students import check_not_adapted

logger = logging.getLogger(__name__)

Fit = Callable[[keras.Model, np.ndarray, np.ndarray], None]
MANIFEST = "manifest.json"
_ROWS = 500
# Of the trial of features, and what rounding may change in them.
_ROWS_TRIED, _FEATURES_SHARE = 4, 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTraining:
    """Trains a member on its shard by Adam.

    Args:
        epochs: passes over the shard.
        batch_size: records in a step.
        learning_rate: of Adam.
    """

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Checks the numbers."""
        _validate.positive_int("epochs", self.epochs)
        _validate.positive_int("batch_size", self.batch_size)
        _validate.positive_finite("learning_rate", self.learning_rate)

    def __call__(
        self, model: keras.Model, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """Trains `model` in place, from the weights it has."""
        if not model.compiled:
            model.compile(
                keras.optimizers.Adam(self.learning_rate),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                jit_compile=False,
            )
        _forget_steps(model.optimizer)
        model.fit(
            inputs,
            labels,
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(inputs)),
            verbose=0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """Fits a member that is one dense layer, by ridge regression to one-hot labels.

    Closed form, so that a thousand teachers take seconds.

    Args:
        penalty: on the weights, relative to features of root mean square norm one.
        sharpness: factor of the regression's outputs, which makes them logits.
    """

    penalty: float = 0.1
    sharpness: float = 8.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        _validate.positive_finite("penalty", self.penalty)
        _validate.positive_finite("sharpness", self.sharpness)

    def __call__(
        self, model: keras.Model, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """Sets the weights of `model`, whatever they were."""
        weights = model.get_weights()
        if [np.ndim(w) for w in weights] != [2, 1]:
            expected = "a model with one dense layer and nothing else to train"
            raise _validate.invalid("model_fn", model, expected)
        classes = len(weights[1])
        rows = np.reshape(inputs, (len(inputs), -1)).astype(np.float64)
        mean = rows.mean(axis=0)
        rows = rows - mean
        targets = np.eye(classes)[labels]
        share = targets.mean(axis=0)
        gram = rows @ rows.T + self.penalty * np.eye(len(rows))
        kernel = rows.T @ np.linalg.solve(gram, targets - share)
        bias = 1.0 / classes - mean @ kernel
        model.set_weights([self.sharpness * kernel, self.sharpness * bias])


def linear_member(num_features: int, num_classes: int) -> keras.Model:
    """The smallest teacher: one dense layer on features, for `RidgeFit`."""
    return keras.Sequential(
        [keras.layers.Input((num_features,)), keras.layers.Dense(num_classes)]
    )


def train_shard_teachers(
    model_fn: Callable[[], keras.Model],
    dataset: tuple[np.ndarray, np.ndarray] | tf.data.Dataset,
    *,
    shards: int,
    features: keras.Model | None = None,
    fit: Fit | None = None,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    seed: int = 0,
    input_range: Sequence[float] = (0.0, 1.0),
) -> TeacherEnsemble:
    """Trains one teacher on each of K disjoint shards.

    All teachers start from the same weights, those of the model that `model_fn` makes
    under `seed`. The order of training follows from `seed` and the shard alone, so a
    resumed run gives the teachers of the uninterrupted one.

    Args:
        model_fn: makes a new member: features (or images) to logits, without layers
            with statistics of `adapt`. With `processes` above one it must be
            importable, so no lambda.
        dataset: private records `(inputs [n, ...], labels int [n])`, or a
            `tf.data.Dataset` of single `(input, label)` pairs in a fixed order.
        shards: number of teachers, K.
        features: a public model, images to features, applied once to all records. It
            must treat them one by one, which is tried.
        fit: trains a member in place, `fit(model, inputs, labels)`; by default
            `ShardTraining()`. One of your own gets a new model for each shard, and
            variables that models share are put back after each. It must
            keep no state between shards, such as an optimizer's: a record would then
            decide about more than one teacher.
        folder: where each teacher is kept in a file of its own as soon as it is
            trained; the same call goes on from there. None keeps nothing.
        processes: how many train at the same time. Above one, process i trains on GPU
            i mod n of the n that are visible here, takes of its memory what it needs
            and sees no other GPU; without any all share the processors. One process
            is this one, whose devices stay as they are. Split and order of training
            do not depend on it: teachers differ by the rounding of devices at most.
            Memory that this process holds on a GPU is missing to the others: set
            `TF_FORCE_GPU_ALLOW_GROWTH=true` before TensorFlow starts.
        seed: of the split, the first weights and the order of training.
        input_range: of the inputs.

    Returns:
        The ensemble.

    Raises:
        ValueError: an argument is out of range, `model_fn` returns one model twice,
            `features` let records meet, a model has statistics of `adapt`, the folder
            holds teachers of other records or settings, or a process has tensors
            before it has its GPU.

    **Privacy**: none by itself: teachers and folder are as private as the records.
    The number of records, the split and all settings must be public. Mechanisms count
    on a record deciding about one teacher alone.

    References:
        PATE, arXiv:1610.05755, arXiv:1802.08908.
    """
    inputs, labels = _as_arrays(dataset)
    plan = ShardPlan(len(inputs), shards, seed)
    if features is not None:
        check_not_adapted("features", features)
        _check_features(features, inputs)
    fit = fit or ShardTraining()
    if _validate.positive_int("processes", processes) > 1:
        _leave_gpu_memory()
    with tempfile.TemporaryDirectory() as scratch:
        where = _validate.writable_dir("folder", folder or scratch)
        _claim(where, plan, model_fn, fit, features, inputs, labels)
        missing = [s for s in range(shards) if _load(where, s) is None]
        if missing:
            known = inputs if features is None else _in_batches(features, inputs)
            job = _Job(model_fn, known, labels, plan, fit, where)
            _train_all(job, missing, processes)
        teachers = [_load(where, shard) or [] for shard in range(shards)]
    stacked = [np.stack(arrays) for arrays in zip(*teachers, strict=True)]
    return TeacherEnsemble(
        model_fn(), stacked, features=features, input_range=input_range
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a process needs to train any of the teachers."""

    model_fn: Callable[[], keras.Model]
    inputs: np.ndarray
    labels: np.ndarray
    plan: ShardPlan
    fit: Fit
    folder: Path

    def run(self, shards: Iterable[int]) -> None:
        """Trains the teachers of these shards, one after the other."""
        # Ours leave nothing behind in a model; what another leaves is not known.
        renewed = type(self.fit) not in (RidgeFit, ShardTraining)
        model, first = None, []
        for shard in shards:
            if model is None or renewed:
                model = self._member(former=model)
                # With the states of random layers.
                first = [(v, keras.ops.convert_to_numpy(v)) for v in model.variables]
            rows = self.plan.indices(shard)
            keras.utils.set_random_seed(self.plan.seed + shard)
            try:
                self.fit(model, self.inputs[rows], self.labels[rows])
                _save(self.folder, shard, model)
            finally:
                # Layers that `model_fn` shares would carry the shard's records on.
                for variable, value in first:
                    variable.assign(value)

    def _member(self, former: keras.Model | None) -> keras.Model:
        """A model of `model_fn` under the seed, which is not the former one."""
        keras.utils.set_random_seed(self.plan.seed)
        model = self.model_fn()
        if model is former:
            expected = "a function that makes a new model in each call"
            raise _validate.invalid("model_fn", self.model_fn, expected)
        return model


def _train_all(job: _Job, shards: list[int], processes: int) -> None:
    logger.info("Training %s of %s teachers.", len(shards), job.plan.shards)
    if processes == 1:
        job.run(shards)
        return
    context = multiprocessing.get_context("spawn")
    parts = [shards[n::processes] for n in range(min(processes, len(shards)))]
    with contextlib.ExitStack() as stack:
        # Of one process each, which has its GPU before it gets its part.
        pools = [concurrent.futures.ProcessPoolExecutor(1, context) for _ in parts]
        for pool in pools:
            stack.enter_context(pool)
        seen = [p.submit(_see_one_gpu, n, processes) for n, p in enumerate(pools)]
        for done in seen:
            done.result()
        work = zip(pools, parts, strict=True)
        for done in [pool.submit(job.run, part) for pool, part in work]:
            done.result()


def _see_one_gpu(number: int, processes: int) -> None:
    """Leaves a process one GPU, and no more of its memory than is needed."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    own = gpus[number % len(gpus)]
    try:
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)
    except RuntimeError as error:
        expected = "1 where modules make tensors as they are imported"
        mend = "Make them in a function, so that a process can choose its GPU first."
        raise _validate.invalid("processes", processes, expected, mend) from error


def _leave_gpu_memory() -> None:
    """Keeps this process from taking all of the memory that the others need."""
    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    except (RuntimeError, ValueError):  # in use already, or with limits
        if os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() != "true":
            logger.warning(
                "This process may hold all memory of the GPUs. If the others find "
                "none, set TF_FORCE_GPU_ALLOW_GROWTH=true before TensorFlow starts."
            )


def _forget_steps(optimizer: keras.optimizers.Optimizer) -> None:
    """Puts an optimizer back to where it started."""
    for variable in optimizer.variables:
        if variable is not optimizer.learning_rate:
            variable.assign(keras.ops.zeros_like(variable))


def _as_arrays(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(dataset, tf.data.Dataset):
        dataset = zip(*dataset.as_numpy_iterator(), strict=True)
    inputs, labels = (np.asarray(part) for part in dataset)
    fits = labels.shape == (len(inputs),) and np.issubdtype(labels.dtype, np.integer)
    if not fits:
        received = (inputs.shape, labels.shape, labels.dtype)
        expected = "inputs [n, ...] and labels [n], whole numbers"
        raise _validate.invalid("dataset", received, expected)
    return inputs, labels


def _in_batches(features: keras.Model, inputs: np.ndarray) -> np.ndarray:
    """Features of all records, float32 `[n, ...]`."""
    apply = tf.function(lambda rows: features(rows, training=False))
    starts = range(0, len(inputs), _ROWS)
    return np.concatenate([apply(inputs[i : i + _ROWS]).numpy() for i in starts])


def _check_features(features: keras.Model, inputs: np.ndarray) -> None:
    """Refuses features of a record that change with others; tried on random rows."""
    random = np.random.default_rng(0)
    whole = np.issubdtype(inputs.dtype, np.integer)
    shape = (_ROWS_TRIED, *inputs.shape[1:])
    draws = random.integers(0, 2, shape) if whole else random.random(shape)
    rows = draws.astype(inputs.dtype)
    base = np.asarray(features(rows, training=False))
    for number in range(_ROWS_TRIED):
        changed = rows.copy()
        changed[number] = 1 - rows[number] if whole else 10 * random.random(shape[1:])
        moved = np.abs(np.asarray(features(changed, training=False)) - base)
        moved = np.delete(moved, number, axis=0)
        if not np.all(moved <= _FEATURES_SHARE * np.abs(base).max()):
            expected = "a model that treats the rows of a batch one by one"
            mend = "A record would get to other shards by the features of others."
            raise _validate.invalid("features", features, expected, mend)


def _claim(
    folder: Path,
    plan: ShardPlan,
    model_fn: Callable[[], keras.Model],
    fit: Fit,
    features: keras.Model | None,
    inputs: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Notes what the folder's teachers were trained from, or compares with it."""
    member = model_fn()
    check_not_adapted("model_fn", member)
    parts = {"inputs": inputs, "labels": labels}
    if features is not None:
        shared = [np.ravel(w) for w in features.get_weights()]
        parts["features"] = np.concatenate([np.zeros(0), *shared])
    facts = {
        "plan": dataclasses.asdict(plan),
        "fit": repr(fit) if dataclasses.is_dataclass(fit) else type(fit).__name__,
        "member": [list(variable.shape) for variable in member.variables],
        **{name: digest_of(array) for name, array in parts.items()},
    }
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("teacher_*.npz")):
            expected = f"a folder whose {MANIFEST} tells what its teachers have seen"
            raise _validate.invalid("folder", str(folder), expected, "Choose another.")
        with replacing(path) as partial:
            partial.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return
    former = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in facts if former.get(name) != facts[name]]
    if differing:
        expected = f"a folder of teachers with the same {', '.join(differing)}"
        raise _validate.invalid("folder", str(folder), expected, "Choose another.")


def _path(folder: Path, shard: int) -> Path:
    return folder / f"teacher_{shard:05d}.npz"


def _save(folder: Path, shard: int, model: keras.Model) -> None:
    """Writes a teacher's file, which is never seen half written."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    with replacing(_path(folder, shard)) as partial:
        np.savez(partial, *[variable.numpy() for variable in variables])


def _load(folder: Path, shard: int) -> list[np.ndarray] | None:
    """A teacher's weights, None if it is missing or damaged."""
    try:
        with np.load(_path(folder, shard)) as arrays:
            return [arrays[f"arr_{index}"] for index in range(len(arrays.files))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logger.warning("The teacher of shard %s is damaged: training anew.", shard)
        return None
