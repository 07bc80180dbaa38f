"""Keras' progress bar for loops that are not Keras' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import keras

# How often the epsilon so far is computed in a run: that takes time, too.
_SHOWN = 10


def counted(
    steps: int,
    *,
    verbose: int,
    unit: str = "step",
    epsilon: Callable[[], float] | None = None,
) -> Iterator[int]:
    """Counts steps on a bar.

    Args:
        steps: how many.
        verbose: as in `keras.utils.Progbar`: 1 shows a bar, 2 one line at the end,
            0 nothing.
        unit: what one of them is called.
        epsilon: gives the epsilon so far, which is asked for at every tenth of the way
            and at the end.

    Yields:
        The number of each step, from 0.
    """
    bar = keras.utils.Progbar(
        steps, verbose=verbose, unit_name=unit, stateful_metrics=["epsilon"]
    )
    for step in range(steps):
        yield step
        values = []
        due = (step + 1) * _SHOWN // steps > step * _SHOWN // steps
        if epsilon is not None and verbose and due:
            values = [("epsilon", epsilon())]
        bar.update(step + 1, values)
