"""Membership inference: can it be told who was in the teacher's training data?

The attacks see what a classifier answers about an image and its label. They say how
much an attacker gets out of one model; they are no bound on what another attack gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dp_transcribe import _validate
from dp_transcribe.data import ImageDataset

_LEAST = 1e-12
_FOLDS = 5
# Logits beyond the first few of a sorted row tell one image from another no better.
_SORTED = 10


@dataclasses.dataclass(frozen=True)
class MembershipResult:
    """How well members are told from others.

    Attributes:
        auc: area under the ROC curve; 0.5 is a coin.
        tpr_at_1e_3: members found where one other image in 1,000 is taken for one.
        tpr_at_1e_2: the same for one in 100.
        attack: name of the attack.
        members: number of members.
        others: number of other images. Of fewer than 1,000 a rate of 1e-3 is none.
        roc: rates of false and of true members, for a picture.
    """

    auc: float
    tpr_at_1e_3: float
    tpr_at_1e_2: float
    attack: str
    members: int
    others: int
    roc: tuple[np.ndarray, np.ndarray] = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | str]:
        """Plain values for JSON, with the rates written as in `tpr_at_1e-3`."""
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "roc"
        }
        for exponent in (3, 2):
            values[f"tpr_at_1e-{exponent}"] = values.pop(f"tpr_at_1e_{exponent}")
        return values


def membership_result(
    member_scores: np.ndarray, other_scores: np.ndarray, attack: str
) -> MembershipResult:
    """Measures an attack by its scores.

    Args:
        member_scores: `[members]`, higher where the attack believes in a member.
        other_scores: `[others]`.
        attack: its name.

    Returns:
        The measures.
    """
    scores = np.concatenate([member_scores, other_scores])
    truth = np.repeat([1, 0], [len(member_scores), len(other_scores)])
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return MembershipResult(
        auc=float(roc_auc_score(truth, scores)),
        tpr_at_1e_3=float(true[false <= 1e-3].max()),
        tpr_at_1e_2=float(true[false <= 1e-2].max()),
        attack=attack,
        members=len(member_scores),
        others=len(other_scores),
        roc=(false, true),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier answers about members and others.

    Attributes:
        members: float `[members, classes]`, logits or log probabilities.
        member_labels: int `[members]`.
        others: float `[others, classes]`.
        other_labels: int `[others]`.

    Raises:
        ValueError: rows and labels do not fit each other.
    """

    members: np.ndarray
    member_labels: np.ndarray
    others: np.ndarray
    other_labels: np.ndarray

    def __post_init__(self) -> None:
        """Checks that every row has a label."""
        for name in ("member", "other"):
            rows, labels = getattr(self, f"{name}s"), getattr(self, f"{name}_labels")
            if np.ndim(rows) != 2 or np.shape(labels) != (len(rows),) or not len(rows):
                expected = (
                    f"one label for each of {len(rows)} rows, and one row or more"
                )
                raise _validate.invalid(f"{name}_labels", np.shape(labels), expected)


def threshold_attack(answers: Answers) -> MembershipResult:
    """Takes for members what the classifier has a small loss on.

    References:
        Yeom et al. 2018, arXiv:1709.01604.
    """
    members = -_losses(answers.members, answers.member_labels)
    others = -_losses(answers.others, answers.other_labels)
    return membership_result(members, others, "threshold on the loss")


def regression_attack(answers: Answers, *, seed: int = 0) -> MembershipResult:
    """Learns what members look like: logistic regression on sorted answers and loss.

    Every image is scored by a regression that was fitted on the other folds.

    Args:
        answers: of the classifier.
        seed: of the folds.

    Returns:
        The measures.

    References:
        Shokri et al. 2017, arXiv:1610.05820, without shadow models.
    """
    features = np.concatenate(
        [
            _features(answers.members, answers.member_labels),
            _features(answers.others, answers.other_labels),
        ]
    )
    truth = np.repeat([1, 0], [len(answers.members), len(answers.others)])
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(
        model, features, truth, cv=folds, method="decision_function"
    )
    name = "logistic regression on sorted answers"
    return membership_result(scores[truth == 1], scores[truth == 0], name)


def offline_lira(answers: Answers, shadows: Sequence[Answers]) -> MembershipResult:
    """Asks how unlikely the answer is for a model that never saw the image.

    Args:
        answers: of the classifier under attack.
        shadows: answers about the same images of shadow models trained like it on
            other data: none of the images was in any shadow's training data.

    Returns:
        The measures.

    Raises:
        ValueError: there are fewer than two shadows.

    References:
        Carlini et al. 2022, Membership Inference Attacks From First Principles,
        arXiv:2112.03570: offline attack with one variance for all images.
    """
    if len(shadows) < 2:
        raise _validate.invalid("shadows", len(shadows), "two shadow models or more")

    def scores(rows: str, labels: str) -> tuple[np.ndarray, np.ndarray]:
        seen = _confidences(getattr(answers, rows), getattr(answers, labels))
        unseen = np.stack(
            [_confidences(getattr(s, rows), getattr(s, labels)) for s in shadows]
        )
        return seen, unseen

    members, other = (
        scores("members", "member_labels"),
        scores("others", "other_labels"),
    )
    pooled = np.concatenate([s.std(axis=0, ddof=1) ** 2 for _, s in (members, other)])
    deviation = np.sqrt(pooled.mean()) + _LEAST
    found = [
        stats.norm.logcdf((seen - unseen.mean(axis=0)) / deviation)
        for seen, unseen in (members, other)
    ]
    return membership_result(found[0], found[1], f"LiRA, {len(shadows)} shadow models")


def strongest_attack(
    answers: Answers, shadows: Sequence[Answers] = (), *, seed: int = 0
) -> MembershipResult:
    """What the attacks find between them, which is what is reported.

    Args:
        answers: of the classifier under attack.
        shadows: of shadow models, for `offline_lira`; none leaves it out.
        seed: of `regression_attack`.

    Returns:
        The attack with the largest area under the curve; each rate is that of the
        attack that is best by it. Choosing after the fact flatters the attacker a
        little.
    """
    results = [threshold_attack(answers), regression_attack(answers, seed=seed)]
    if shadows:
        results.append(offline_lira(answers, shadows))
    return dataclasses.replace(
        max(results, key=lambda result: result.auc),
        tpr_at_1e_3=max(result.tpr_at_1e_3 for result in results),
        tpr_at_1e_2=max(result.tpr_at_1e_2 for result in results),
    )


def ask(
    predict: Callable[[np.ndarray], np.ndarray],
    members: tuple[np.ndarray, np.ndarray],
    others: tuple[np.ndarray, np.ndarray],
) -> Answers:
    """What a classifier answers about members and others.

    Args:
        predict: images `[n, ...]` to probabilities `[n, classes]`.
        members: images and labels it was trained on, or its teacher was.
        others: images and labels of the same kind that it was not trained on.

    Returns:
        The answers, as log probabilities.
    """
    rows = [
        np.log(np.maximum(predict(images), _LEAST))
        for images in (members[0], others[0])
    ]
    return Answers(rows[0], members[1], rows[1], others[1])


def _losses(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross entropy of each row's label."""
    return -special.log_softmax(rows, axis=1)[np.arange(len(rows)), labels]


def _confidences(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log of p / (1 - p) of each row's label, which is nearly Gaussian."""
    logs = special.log_softmax(np.asarray(rows, np.float64), axis=1)
    truth = logs[np.arange(len(rows)), labels]
    logs[np.arange(len(rows)), labels] = -np.inf
    return truth - special.logsumexp(logs, axis=1)


def _features(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sorted log probabilities and the loss, `[n, features]`."""
    logs = special.log_softmax(np.asarray(rows, np.float64), axis=1)
    ranked = -np.sort(-logs, axis=1)[:, :_SORTED]
    return np.column_stack([ranked, _losses(rows, labels)])


def never_seen(
    dataset: ImageDataset, trained: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images that no model was trained on, and their labels, for membership attacks.

    Training images where some are left, since they are drawn as the others were, if the
    teacher's were drawn at random. Test images may differ by themselves (half of
    MNIST's were written by other people), and so may the first training images from
    the last; an attack takes either for membership.

    Args:
        dataset: the data set.
        trained: how many of its first training images were used.
        most: how many are wanted.

    Returns:
        The last training images beyond the first `trained`, or else test images; at
        most `most`.
    """
    left = slice(max(trained, len(dataset.train_images) - most), None)
    if len(dataset.train_images[left]):
        return dataset.train_images[left], dataset.train_labels[left]
    return dataset.test_images[:most], dataset.test_labels[:most]
