"""Tables: encoding within public bounds, and a table distilled end to end."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dp_transcribe.distillation import (
    DPKIP,
    CategoricalColumn,
    KIPTraining,
    NTKKernel,
    NumericColumn,
    TableEncoder,
)

AGE = NumericColumn("age", 0.0, 100.0)
COLOUR = CategoricalColumn("colour", ("red", "green"))


def test_rows_are_encoded_within_public_bounds():
    table = {"age": [0, 50, 200, np.nan], "colour": ["red", "green", "blue", "red"]}
    vectors = TableEncoder((AGE, COLOUR)).encode(table)
    expected = [[-1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    np.testing.assert_array_equal(vectors, expected)


def test_a_row_does_not_depend_on_the_others():
    encoder = TableEncoder((AGE, COLOUR))
    alone = encoder.encode({"age": [30], "colour": ["red"]})
    together = encoder.encode({"age": [30, 99], "colour": ["red", "green"]})
    np.testing.assert_array_equal(alone[0], together[0])


def test_decoding_inverts_encoding():
    encoder = TableEncoder((AGE, COLOUR))
    table = {"age": np.array([7.0, 80.0]), "colour": np.array(["green", "red"])}
    decoded = encoder.decode(encoder.encode(table))
    np.testing.assert_allclose(decoded["age"], table["age"], atol=1e-4)
    np.testing.assert_array_equal(decoded["colour"], table["colour"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NumericColumn("x", 1.0, 1.0), "high"),
        (lambda: CategoricalColumn("x", ("a", "a")), "categories"),
        (lambda: TableEncoder((AGE, AGE)), "columns"),
        (lambda: TableEncoder((AGE,)).encode({"size": [1]}), "table"),
        (lambda: TableEncoder((AGE,)).encode({"age": 3.0}), "table"),
        (lambda: TableEncoder((AGE,)).encode({"age": [[3.0]]}), "table"),
        (
            lambda: TableEncoder((AGE, COLOUR)).encode({"age": [1], "colour": "ab"}),
            "table",
        ),
        (lambda: TableEncoder((AGE,)).encode({"age": ["old"]}), "age"),
        (lambda: TableEncoder((AGE,)).decode(np.zeros((2, 2))), "vectors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()


def test_a_refusal_quotes_no_value_of_the_table():
    with pytest.raises(ValueError, match="`age`") as refused:
        TableEncoder((AGE,)).encode({"age": [1.0, "secret"]})
    assert "secret" not in str(refused.value)
    assert refused.value.__suppress_context__


# Sizes that such measurements can have, known without the table; the standard errors
# have a tenth of them.
HIGHEST = {"radius": 100.0, "texture": 100.0, "perimeter": 1000.0, "area": 10_000.0}


def highest(name):
    """A public bound of a column: measures of shape are of the order of one."""
    kind = next((measure for measure in HIGHEST if measure in name), None)
    high = HIGHEST.get(kind, 2.0)
    return high / 10.0 if "error" in name else high


def test_a_real_table_distilled_to_a_few_rows_trains_a_classifier():
    data = load_breast_cancer()
    columns = tuple(
        NumericColumn(str(name), 0.0, highest(str(name))) for name in data.feature_names
    )
    encoder = TableEncoder(columns)
    rows = encoder.encode(dict(zip(data.feature_names, data.data.T, strict=True)))
    test = np.arange(len(rows)) % 4 == 0
    plan = KIPTraining(
        steps=40, learning_rate=0.1, sampling_probability=0.5, l2_norm=0.05,
        penalty=1e-3,
    )  # fmt: skip
    initial = np.random.default_rng(0).uniform(-1, 1, (4, encoder.width))
    model = DPKIP(NTKKernel(), initial, 2, plan, seed=0)
    model.fit(rows[~test], data.target[~test], target_epsilon=10.0, delta=1e-4)
    distilled = model.distilled()
    classifier = LogisticRegression().fit(distilled.images, distilled.labels)
    scores = classifier.decision_function(rows[test])
    assert roc_auc_score(data.target[test], scores) > 0.9
