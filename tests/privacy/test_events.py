"""Events: what is accepted, flattened and written."""

import json
import math

import dp_accounting
import pytest

from dp_transcribe.privacy.events import (
    PureDpEvent,
    check_event,
    event_from_dict,
    event_to_dict,
    leaves,
)

GAUSSIAN = dp_accounting.GaussianDpEvent(1.1)
POISSON = dp_accounting.PoissonSampledDpEvent(0.1, GAUSSIAN)
FIXED = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, GAUSSIAN)
EVENTS = [
    GAUSSIAN,
    POISSON,
    FIXED,
    PureDpEvent(1.5),
    dp_accounting.NoOpDpEvent(),
    dp_accounting.NonPrivateDpEvent(),
    dp_accounting.SelfComposedDpEvent(POISSON, 12),
    dp_accounting.ComposedDpEvent(
        [PureDpEvent(0.1), dp_accounting.SelfComposedDpEvent(GAUSSIAN, 3)]
    ),
]


@pytest.mark.parametrize("event", EVENTS)
def test_json_round_trip(event):
    text = json.dumps(event_to_dict(event), allow_nan=False)
    assert event_from_dict(json.loads(text)) == event


def test_leaves_multiply_counts_and_drop_what_costs_nothing():
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(EVENTS[-1], 2),
            dp_accounting.NoOpDpEvent(),
            dp_accounting.SelfComposedDpEvent(GAUSSIAN, 0),
        ]
    )
    assert list(leaves(event, 5)) == [(PureDpEvent(0.1), 10), (GAUSSIAN, 30)]


@pytest.mark.parametrize(
    "event,match",
    [
        (dp_accounting.UnsupportedDpEvent(), "known type"),
        (dp_accounting.LaplaceDpEvent(1.0), "known type"),
        ("GaussianDpEvent", "known type"),
        (None, "known type"),
        (dp_accounting.GaussianDpEvent(-1.0), "event.noise_multiplier"),
        (dp_accounting.GaussianDpEvent(math.nan), "event.noise_multiplier"),
        (dp_accounting.GaussianDpEvent(math.inf), "event.noise_multiplier"),
        (dp_accounting.PoissonSampledDpEvent(1.5, GAUSSIAN), "sampling_probability"),
        (dp_accounting.PoissonSampledDpEvent(0.5, PureDpEvent(1.0)), "Gaussian"),
        (dp_accounting.SelfComposedDpEvent(GAUSSIAN, 1.5), "event.count"),
        (
            dp_accounting.SampledWithoutReplacementDpEvent(10, 11, GAUSSIAN),
            "from 0 to 10",
        ),
        (
            dp_accounting.ComposedDpEvent(
                [GAUSSIAN, dp_accounting.GaussianDpEvent(-2.0)]
            ),
            r"event.events\[1\].noise_multiplier",
        ),
    ],
)
def test_what_cannot_be_accounted_is_refused(event, match):
    with pytest.raises(ValueError, match=match):
        check_event(event)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, "1"])
def test_pure_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match="`epsilon`.*NonPrivateDpEvent"):
        PureDpEvent(epsilon)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"type": "os.system"},
        {"type": "GaussianDpEvent"},
        {"type": "GaussianDpEvent", "noise_multiplier": 1.0, "more": 2},
        {"type": "GaussianDpEvent", "noise_multiplier": "1"},
    ],
)
def test_damaged_dictionary_is_refused(values):
    with pytest.raises(ValueError, match="Invalid value"):
        event_from_dict(values)
