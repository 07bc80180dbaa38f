"""Membership attacks: known answers, and sklearn's own curves."""

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from dp_transcribe.data import ImageDataset
from dp_transcribe.evaluation import (
    Answers,
    MembershipResult,
    ask,
    membership,
    offline_lira,
    regression_attack,
    strongest_attack,
    threshold_attack,
)
from dp_transcribe.evaluation.membership import membership_result, never_seen

CLASSES = 5


def answers(seed, advantage, *, members=1500, others=2000, difficulty=None):
    """Logits whose right class stands out by `advantage` more for members."""
    random = np.random.default_rng(seed)
    total = members + others
    labels = np.arange(total) % CLASSES
    rows = random.normal(size=(total, CLASSES))
    level = 2.0 if difficulty is None else difficulty
    rows[np.arange(total), labels] += level
    rows[np.arange(members), labels[:members]] += advantage
    return Answers(rows[:members], labels[:members], rows[members:], labels[members:])


def test_measures_of_two_gaussians_are_the_known_ones():
    random = np.random.default_rng(0)
    result = membership_result(
        random.normal(1.0, 1.0, 100_000), random.normal(size=100_000), "known"
    )
    assert result.auc == pytest.approx(norm.cdf(1.0 / np.sqrt(2.0)), abs=5e-3)
    assert result.tpr_at_1e_2 == pytest.approx(norm.sf(norm.isf(1e-2) - 1.0), abs=0.01)
    assert result.tpr_at_1e_3 == pytest.approx(norm.sf(norm.isf(1e-3) - 1.0), abs=0.01)


def test_the_rate_at_few_false_alarms_is_never_one_at_more():
    result = membership_result(np.arange(10.0), np.full(50, 5.0), "ties")
    assert result.tpr_at_1e_3 == result.tpr_at_1e_2 == 0.4  # 6 to 9: above every other


@pytest.mark.parametrize("attack", [threshold_attack, regression_attack])
def test_attacks_find_members_and_do_not_invent_them(attack):
    assert attack(answers(1, 2.0)).auc > 0.75
    assert abs(attack(answers(2, 0.0)).auc - 0.5) < 0.03


def test_the_threshold_is_sklearns_curve_of_the_loss():
    found = answers(3, 1.0)
    rows = np.concatenate([found.members, found.others])
    labels = np.concatenate([found.member_labels, found.other_labels])
    losses = -log_softmax(rows, axis=1)[np.arange(len(rows)), labels]
    truth = np.arange(len(rows)) < len(found.members)
    assert threshold_attack(found).auc == pytest.approx(roc_auc_score(truth, -losses))


def test_lira_finds_what_difficulty_hides_from_the_threshold():
    difficulty = np.random.default_rng(4).normal(2.0, 4.0, 3500)
    target = answers(5, 3.0, difficulty=difficulty)
    shadows = [answers(seed, 0.0, difficulty=difficulty) for seed in range(6, 14)]
    lira = offline_lira(target, shadows)
    plain = threshold_attack(target)
    assert lira.auc > plain.auc + 0.1
    assert lira.tpr_at_1e_2 > 4 * plain.tpr_at_1e_2
    assert strongest_attack(target, shadows).attack == lira.attack
    innocent = answers(15, 0.0, difficulty=difficulty)
    assert abs(offline_lira(innocent, shadows).auc - 0.5) < 0.03


def test_lira_wants_shadow_models():
    with pytest.raises(ValueError, match="`shadows`"):
        offline_lira(answers(0, 0.0), [answers(1, 0.0)])


def test_ask_takes_probabilities_of_zero():
    probabilities = np.eye(CLASSES)[[0, 1]]
    images, labels = np.zeros((2, 4)), np.array([0, 0])
    found = ask(lambda images: probabilities, (images, labels), (images, labels))
    assert np.all(np.isfinite(found.members))


def test_names_in_json():
    values = threshold_attack(answers(0, 1.0)).to_dict()
    assert {"auc", "tpr_at_1e-3", "tpr_at_1e-2", "attack"} <= values.keys()
    assert "roc" not in values


def test_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="`member_labels`"):
        Answers(np.zeros((3, 2)), np.zeros(2), np.zeros((3, 2)), np.zeros(3))


def test_each_rate_that_is_reported_is_the_best_attacks(monkeypatch):
    def found(auc, at_1e_3, at_1e_2):
        result = MembershipResult(auc, at_1e_3, at_1e_2, "made up", 1, 1, ())
        return lambda *_, **__: result

    monkeypatch.setattr(membership, "threshold_attack", found(0.6, 0.0, 0.3))
    monkeypatch.setattr(membership, "regression_attack", found(0.5, 0.1, 0.2))
    best = strongest_attack(None)
    assert (best.auc, best.tpr_at_1e_3, best.tpr_at_1e_2) == (0.6, 0.1, 0.3)


@pytest.mark.parametrize(
    ("trained", "first", "last"), [(30, 60, 80), (70, 70, 80), (80, None, None)]
)
def test_strangers_are_training_images_that_are_left(trained, first, last):
    random = np.random.default_rng(0)

    def part(count):
        return random.random((count, 2, 2, 1), np.float32), np.arange(count) % CLASSES

    dataset = ImageDataset("mnist", *part(80), *part(60), CLASSES, "noise")
    images, labels = never_seen(dataset, trained, 20)
    if first is None:
        np.testing.assert_array_equal(images, dataset.test_images[:20])
        np.testing.assert_array_equal(labels, dataset.test_labels[:20])
    else:
        np.testing.assert_array_equal(images, dataset.train_images[first:last])
        np.testing.assert_array_equal(labels, dataset.train_labels[first:last])
