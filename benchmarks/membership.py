"""Compares our membership attacks with those of `tensorflow-empirical-privacy`.

    python benchmarks/peers/make_environments.py --peers=empirical_privacy
    python benchmarks/membership.py --output=membership.json

That package hides TF-Privacy and does not run beside this project, so it attacks in an
environment of its own, which needs a network to be made. Both attack the same answers,
made here of random numbers: once alike for members and others, once with the members'
own logit raised. Where the environment is on another machine, `--write` writes the
answers alone, `peers/empirical_privacy_attacks.py` attacks them there, and `--theirs`
takes what it printed.

The thresholds must agree to 1e-6. The regressions are not the same attack (theirs takes
a row as it is and two folds, ours sorted log probabilities and five): where members
differ, ours must not find less than theirs by more than 0.02. Ends with status 1 where
that is not so.

The tests write answers, attack them with ours and compare given figures. They do not
run the peer itself, for want of a network.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from scipy.special import log_softmax  # noqa: E402

from dp_transcribe import _validate  # noqa: E402
from dp_transcribe.evaluation import (  # noqa: E402
    Answers,
    regression_attack,
    threshold_attack,
)
from dp_transcribe.programs import refuse  # noqa: E402
from dp_transcribe.reporting import write_json  # noqa: E402

PEER = "empirical_privacy"
ATTACKS = Path(__file__).with_name("peers") / "empirical_privacy_attacks.py"
MEMBERS, OTHERS, CLASSES = 1000, 1500, 5
RAISED = {"alike": 0.0, "raised": 1.0}
SEEDS = (0, 1, 2)
SAME, WEAKER = 1e-6, 0.02


def make_answers(raised, rows):
    """Answers about random images, members' own logits raised."""
    random = np.random.default_rng(0)
    labels = np.arange(MEMBERS + OTHERS) % CLASSES
    logits = random.normal(size=(len(labels), CLASSES))
    logits[np.arange(len(labels)), labels] += 2.0
    logits[np.arange(MEMBERS), labels[:MEMBERS]] += raised
    if rows == "log probabilities":
        logits = log_softmax(logits, axis=1)
    return Answers(
        logits[:MEMBERS], labels[:MEMBERS], logits[MEMBERS:], labels[MEMBERS:]
    )


def make_cases():
    """All answers that are attacked, by name."""
    return {
        f"{kind}, {rows}": make_answers(raised, rows)
        for kind, raised in RAISED.items()
        for rows in ("logits", "log probabilities")
    }


def write_answers(path, cases):
    """Writes the answers as `empirical_privacy_attacks.py` reads them."""
    arrays = {
        f"{name}/{part}": getattr(answers, part)
        for name, answers in cases.items()
        for part in ("members", "member_labels", "others", "other_labels")
    }
    np.savez(path, **arrays)


def our_attacks(cases):
    """AUCs of our attacks, by case; one of the regression for each seed."""
    return {
        name: {
            "threshold": threshold_attack(answers).auc,
            "regression": [regression_attack(answers, seed=s).auc for s in SEEDS],
        }
        for name, answers in cases.items()
    }


def their_attacks(path, peers_dir):
    """AUCs of the peer's attacks on the answers at `path`, in its environment."""
    python = peers_dir.resolve() / PEER / "bin" / "python"
    if not python.exists():
        mend = f"Run peers/make_environments.py --peers={PEER}, which needs a network."
        expected = f"a folder with the environment {PEER}"
        raise _validate.invalid("peers_dir", str(peers_dir), expected, mend)
    seeds = [str(seed) for seed in SEEDS]
    done = subprocess.run(
        [python, ATTACKS, path, *seeds], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip()[-500:]
        expected = f"an environment {PEER} that works"
        raise _validate.invalid("peers_dir", str(peers_dir), expected, last)
    return json.loads(done.stdout.splitlines()[-1])


def check_theirs(theirs, cases):
    """Refuses figures of other answers or attacks than ours."""
    names = isinstance(theirs, dict) and {
        name: {*found} for name, found in theirs.items() if isinstance(found, dict)
    }
    if names != {name: {"threshold", "regression"} for name in cases}:
        expected = f"threshold and regression of {list(cases)}"
        raise _validate.invalid("theirs", names or theirs, expected)


def differences(ours, theirs):
    """What does not agree, in words; nothing if all does."""
    found = []
    for name, own in ours.items():
        other = theirs[name]
        if not abs(own["threshold"] - other["threshold"]) <= SAME:
            figures = f"{own['threshold']:.6f}, theirs {other['threshold']:.6f}"
            found.append(f"{name}: threshold {figures}")
        weakest, strongest = min(own["regression"]), max(other["regression"])
        if name.startswith("raised") and not weakest >= strongest - WEAKER:
            found.append(f"{name}: regression {weakest:.3f}, theirs {strongest:.3f}")
    return found


def compare(options, cases):
    """Attacks, writes the figures and returns what does not agree."""
    if options.theirs is not None:
        theirs = json.loads(options.theirs.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "answers.npz"
            write_answers(path, cases)
            theirs = their_attacks(path, options.peers_dir)
    check_theirs(theirs, cases)
    ours = our_attacks(cases)
    found = differences(ours, theirs)
    write_json(options.output, {"ours": ours, "theirs": theirs, "differences": found})
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers_dir", type=Path, default=Path(".peers"))
    parser.add_argument("--output", type=Path, default=Path("membership.json"))
    parser.add_argument("--write", type=Path, help="only writes the answers, an .npz")
    parser.add_argument("--theirs", type=Path, help="the peer's figures, as JSON")
    options = parser.parse_args(arguments)
    cases = make_cases()
    try:
        if options.write is not None:
            write_answers(options.write, cases)
            return 0
        found = compare(options, cases)
    except (ValueError, OSError) as error:
        refuse(error)
    print("\n".join(found) or f"Agreed on {len(cases)} cases.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
