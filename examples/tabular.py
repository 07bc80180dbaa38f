"""Distils a private table into a few rows and trains scikit-learn classifiers on them.

    python examples/tabular.py --epsilon=1 --output_dir=output/tabular

The table is scikit-learn's breast cancer data set: 569 people, 30 measurements, two
classes. Writes report.json (ROC-AUC and PR-AUC of each classifier trained on the real
rows and on the distilled ones), aucs.png, distilled.npz, statement.json and
statement.txt. The guarantee is for people: unit RECORD.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from absl import app, flags
from sklearn.base import ClassifierMixin
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from dp_transcribe import _validate, reporting
from dp_transcribe._files import discard
from dp_transcribe.distillation import (
    DPKIP,
    DistilledDataset,
    KIPTraining,
    NTKKernel,
    NumericColumn,
    TableEncoder,
)
from dp_transcribe.programs import parse_flags, refuse

_LOGGER = logging.getLogger(__name__)
# Sizes that a cell nucleus' measures can have, rounded up; the standard errors have a
# tenth of them. Not the extremes of the table, which would tell of single people.
HIGHEST = {
    "radius": 50.0,
    "texture": 50.0,
    "perimeter": 300.0,
    "area": 5000.0,
    "smoothness": 0.3,
    "compactness": 2.0,
    "concavity": 2.0,
    "concave points": 0.5,
    "symmetry": 1.0,
    "fractal dimension": 0.3,
}
CLASSES = 2
REPORT, PICTURE = "report.json", "aucs.png"

FLAGS = flags.FLAGS


def encoder() -> TableEncoder:
    """Columns with public bounds."""
    columns = []
    for name in load_breast_cancer().feature_names:
        kind = next(measure for measure in HIGHEST if measure in name)
        high = HIGHEST[kind] / (10.0 if "error" in name else 1.0)
        columns.append(NumericColumn(str(name), 0.0, high))
    return TableEncoder(tuple(columns))


def load_rows() -> tuple[np.ndarray, np.ndarray]:
    """All rows within the public bounds and their labels; every fourth is for tests."""
    data = load_breast_cancer()
    table = dict(zip(data.feature_names, data.data.T, strict=True))
    return encoder().encode(table), data.target


def classifiers(seed: int) -> dict[str, ClassifierMixin]:
    """Several kinds of classifiers."""
    return {
        "logistic regression": LogisticRegression(max_iter=1000),
        "naive Bayes": GaussianNB(),
        "nearest neighbours": KNeighborsClassifier(5),
        "random forest": RandomForestClassifier(random_state=seed),
        "perceptron": MLPClassifier((32,), max_iter=1000, random_state=seed),
    }


def distil_rows(rows: np.ndarray, labels: np.ndarray) -> DistilledDataset:
    """Rows learnt by DP-KIP with the tangent kernel, from uniform noise."""
    plan = KIPTraining(
        steps=FLAGS.steps, learning_rate=0.1, l2_norm=0.05, sampling_probability=0.5
    )
    count = CLASSES * _validate.positive_int("rows_per_class", FLAGS.rows_per_class)
    initial = np.random.default_rng(FLAGS.seed).uniform(-1, 1, (count, rows.shape[1]))
    model = DPKIP(NTKKernel(), initial, CLASSES, plan, seed=FLAGS.seed)
    model.fit(rows, labels, target_epsilon=FLAGS.epsilon, delta=FLAGS.delta)
    return model.distilled()


def measure(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, dict[str, float]]:
    """ROC-AUC and PR-AUC on the test rows of each classifier."""
    found = {}
    for name, classifier in classifiers((FLAGS.seed or 0) % 2**32).items():
        scores = classifier.fit(*train).predict_proba(test[0])[:, 1]
        found[name] = {
            "roc_auc": float(roc_auc_score(test[1], scores)),
            "pr_auc": float(average_precision_score(test[1], scores)),
        }
    return found


def run() -> dict[str, Any]:
    """Distils as the flags say and writes the results.

    Returns:
        The report, as it is in report.json.
    """
    _validate.positive_finite("epsilon", FLAGS.epsilon)
    _validate.fraction_open("delta", FLAGS.delta)
    _validate.optional_seed("seed", FLAGS.seed)
    folder = _validate.writable_dir("output_dir", FLAGS.output_dir)
    rows, labels = load_rows()
    for_test = np.arange(len(rows)) % 4 == 0
    train, test = (
        (rows[~for_test], labels[~for_test]),
        (rows[for_test], labels[for_test]),
    )
    distilled = distil_rows(*train)
    # An older run's would stand beside the new rows if this one were interrupted.
    discard(folder, (REPORT, PICTURE))
    distilled.save(folder)
    report = {
        "dataset": "breast_cancer",
        "rows": {"real": len(train[0]), "distilled": len(distilled)},
        "real": measure(train, test),
        "distilled": measure((distilled.images, distilled.labels), test),
        "statement": distilled.statement.to_dict(),
    }
    reporting.write_json(folder / REPORT, report)
    plot(report, folder / PICTURE)
    return report


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of each classifier on the real and on the distilled rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, key, title in zip(
        axes, ("roc_auc", "pr_auc"), ("ROC-AUC", "PR-AUC"), strict=True
    ):
        names = list(report["real"])
        for shift, rows in ((-0.2, "real"), (0.2, "distilled")):
            values = [report[rows][name][key] for name in names]
            places = np.arange(len(names)) + shift
            panel.bar(places, values, 0.4, label=f"{report['rows'][rows]} {rows} rows")
        panel.set_xticks(np.arange(len(names)), names, rotation=20)
        panel.set_title(title)
        panel.set_ylim(0, 1)
    axes[0].legend(loc="lower left")
    epsilon = report["statement"]["epsilon"]
    figure.suptitle(f"Breast cancer, epsilon {epsilon:.3g} per RECORD")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    """Runs the example; complaints about what was given are one line."""
    del argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = run()
    except (ValueError, OSError) as error:
        refuse(error)
    for rows in ("real", "distilled"):
        for name, aucs in report[rows].items():
            _LOGGER.info("%s %s: %s", rows, name, aucs)


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    real = functools.partial(flags.DEFINE_float, flag_values=values)
    whole = functools.partial(flags.DEFINE_integer, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    real("epsilon", 1.0, "Epsilon per record.")
    real("delta", 1e-5, "Delta.")
    whole("rows_per_class", 5, "Distilled rows of each class.", lower_bound=3)
    whole("steps", 40, "Noisy steps.", lower_bound=1)
    text("output_dir", "output/tabular", "Where the results go.")
    whole("seed", None, "Makes the run repeatable; not for a release.")


if __name__ == "__main__":
    define_flags(FLAGS)
    app.run(main, flags_parser=parse_flags)
