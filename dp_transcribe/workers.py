"""What several processes that train one student need of each other.

Under `tf.distribute.MultiWorkerMirroredStrategy` every worker runs the same program.
Each keeps a ledger of its own; the ledgers are the same because all count the same
steps.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

T = TypeVar("T")

# What a collective operation raises when a worker at its other end is gone.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


class WorkerLostError(RuntimeError):
    """Another worker ended or cannot be reached; the run is over."""


def own_replicas(strategy: tf.distribute.Strategy) -> list[int]:
    """Indices, among the replicas of all workers, of those in this process."""
    indices = strategy.experimental_distribute_values_from_function(
        lambda context: np.int64(context.replica_id_in_sync_group)
    )
    return [int(index) for index in strategy.experimental_local_results(indices)]


def has_other_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether some replicas live in other processes."""
    return len(own_replicas(strategy)) < strategy.num_replicas_in_sync


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process holds the first replica; it alone writes files."""
    return own_replicas(strategy)[0] == 0


def gather_parts(
    strategy: tf.distribute.Strategy, parts: list[np.ndarray]
) -> np.ndarray:
    """Puts together what every replica holds; all workers call it at once.

    Args:
        strategy: of the run.
        parts: one array for each replica in this process, all of one shape.

    Returns:
        `[replicas, ...]`, over all workers, in the order of their indices.
    """
    if not has_other_workers(strategy):
        return np.stack(parts)
    # Collective operations know few types; bytes travel as int32.
    rows = [np.frombuffer(part.tobytes(), np.uint8) for part in parts]
    words = [np.pad(row, (0, -len(row) % 4)).view(np.int32) for row in rows]
    first = own_replicas(strategy)[0]
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(
            words[context.replica_id_in_sync_group - first][None]
        )
    )
    gathered = strategy.gather(values, axis=0).numpy().view(np.uint8)
    size, shape, dtype = len(rows[0]), parts[0].shape, parts[0].dtype
    return np.ascontiguousarray(gathered[:, :size]).view(dtype).reshape(-1, *shape)


def check_equal(strategy: tf.distribute.Strategy, state: dict[str, bytes]) -> None:
    """Refuses to go on when workers differ in what must be the same on all.

    Args:
        strategy: of the run.
        state: what must be the same, by name. Only digests are exchanged.

    Raises:
        ValueError: workers differ; nothing was spent.
    """
    count = len(own_replicas(strategy))
    for name, value in state.items():
        digest = np.frombuffer(hashlib.sha256(value).digest(), np.int32)
        digests = gather_parts(strategy, [digest] * count)
        if np.any(digests != digests[0]):
            raise ValueError(
                f"The workers differ in their {name}. Nothing was spent. Build the "
                "transcriber inside the strategy's scope with the same arguments on "
                "every worker, or load the same checkpoint on every worker."
            )


@contextlib.contextmanager
def losing_no_worker(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Says what happened when a worker is lost inside.

    Raises:
        WorkerLostError: another worker ended or cannot be reached.
    """
    try:
        yield
    except _LOST as error:
        if not has_other_workers(strategy):
            raise
        raise WorkerLostError(
            "Another worker ended or cannot be reached, so the run ends here. The "
            "ledger counts the step that was under way. Start all workers again, "
            f"from the last checkpoint if there is one. ({type(error).__name__})"
        ) from error


def outside_scopes(make: Callable[[], T]) -> T:
    """Calls `make` where no strategy's scope is open: a scope belongs to a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def local_devices(strategy: tf.distribute.Strategy) -> tuple[Any, ...]:
    """Devices of the replicas in this process; None leaves the place open."""
    try:
        return tuple(strategy.extended.worker_devices)
    except RuntimeError:  # the default strategy has no devices of its own
        return (None,)


class LocalCopy:
    """A model's copy in this process alone, for what needs no other worker.

    Keras 3 can neither evaluate nor predict over several workers.

    Args:
        model: Functional or Sequential.
        compile_arguments: of the copy; losses and metrics are copied.
    """

    def __init__(self, model: keras.Model, compile_arguments: dict[str, Any]) -> None:
        self._model = model
        self._compile_arguments = compile_arguments
        self._copy: keras.Model | None = None

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the method of that name returns for the weights as they are."""

        def on_copy() -> Any:
            if self._copy is None:
                self._copy = keras.models.clone_model(self._model)
                config = keras.saving.serialize_keras_object(self._compile_arguments)
                self._copy.compile(**keras.saving.deserialize_keras_object(config))
            self._copy.set_weights(self._model.get_weights())
            return getattr(self._copy, method)(*args, **kwargs)

        return outside_scopes(on_copy)
