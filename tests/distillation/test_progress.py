"""Long private fits say how far they are, and what was spent."""

import re

import keras
import numpy as np
import pytest

from dp_transcribe.distillation import LinearTraining, PrivateLinearModel

DELTA = 1e-5


def fitted(verbose):
    features, labels = np.eye(20, 4, dtype=np.float32), np.arange(20) % 2
    model = PrivateLinearModel(2, LinearTraining(steps=25), seed=1)
    return model.fit(features, labels, target_epsilon=1.0, delta=DELTA, verbose=verbose)


def test_the_bar_ends_at_the_epsilon_of_the_statement(capsys):
    epsilon = fitted(verbose=1).privacy_statement().epsilon
    shown = re.findall(r"epsilon: ([0-9.]+)", capsys.readouterr().out)
    assert float(shown[-1]) == pytest.approx(epsilon, abs=1e-4)


def test_the_bar_is_told_of_the_epsilon_so_far(monkeypatch):
    told = []

    def update(bar, current, values=(), finalize=None):
        del bar, current, finalize
        told.extend(epsilon for _, epsilon in values)

    # What is shown of it depends on the time: the bar is drawn twenty times a second.
    monkeypatch.setattr(keras.utils.Progbar, "update", update)
    epsilon = fitted(verbose=1).privacy_statement().epsilon
    assert told[0] < 0.5 * epsilon
    assert told == sorted(told)
    assert told[-1] == pytest.approx(epsilon, abs=1e-4)


def test_silence_can_be_had(capsys):
    fitted(verbose=0)
    assert capsys.readouterr().out == ""
