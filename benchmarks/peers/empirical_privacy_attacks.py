"""The attacks of `tensorflow-empirical-privacy`; run by `membership.py`, or alone:

    python empirical_privacy_attacks.py answers.npz 0 1 2 > theirs.json

The last line printed is JSON: AUCs by case, of the regression one for each seed.
"""

import json
import sys

import numpy as np
from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack import (
    membership_inference_attack,
)
from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack.data_structures import (  # noqa: E501
    AttackInputData,
    AttackType,
)


def attack(arrays, case, kind, seed):
    """AUC of one attack."""
    np.random.seed(seed)  # of their folds, which take no other
    answers = AttackInputData(
        logits_train=arrays[f"{case}/members"],
        logits_test=arrays[f"{case}/others"],
        labels_train=arrays[f"{case}/member_labels"],
        labels_test=arrays[f"{case}/other_labels"],
    )
    found = membership_inference_attack.run_attacks(answers, attack_types=[kind])
    return float(found.single_attack_results[0].get_auc())


def main(path, *seeds):
    """AUCs of the attacks that ours are compared with."""
    arrays = np.load(path)
    regression = AttackType.LOGISTIC_REGRESSION
    return {
        case: {
            "threshold": attack(arrays, case, AttackType.THRESHOLD_ATTACK, 0),
            "regression": [attack(arrays, case, regression, int(s)) for s in seeds],
        }
        for case in sorted({name.split("/")[0] for name in arrays.files})
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
