"""benchmarks/membership.py: its answers, its comparison, and what fails in words."""

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


membership = load("membership_benchmark", BENCHMARKS / "membership.py")
environments = load("environments", BENCHMARKS / "peers" / "make_environments.py")


@pytest.fixture(scope="module")
def ours():
    return membership.our_attacks(membership.make_cases())


def fake_peer(folder, program):
    """An interpreter of the peer's environment that runs `program`."""
    python = folder / "empirical_privacy" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\nimport json, sys\n{program}\n")
    python.chmod(0o755)


def test_answers_are_written_as_the_peer_reads_them(tmp_path):
    assert membership.main([f"--write={tmp_path / 'answers.npz'}"]) == 0
    arrays = np.load(tmp_path / "answers.npz")
    cases = membership.make_cases()
    assert {name.split("/")[0] for name in arrays.files} == set(cases)
    for name, answers in cases.items():
        np.testing.assert_array_equal(arrays[f"{name}/members"], answers.members)
        labels = arrays[f"{name}/other_labels"]
        assert np.issubdtype(labels.dtype, np.integer)
        assert labels.shape == arrays[f"{name}/others"].shape[:1]


def test_ours_find_members_that_differ_and_no_others(ours):
    for name, found in ours.items():
        for auc in (found["threshold"], *found["regression"]):
            if name.startswith("raised"):
                assert auc > 0.65
            else:
                assert abs(auc - 0.5) < 0.04


def test_a_regression_that_finds_a_little_more_agrees(ours):
    theirs = copy.deepcopy(ours)
    for name, found in theirs.items():
        gain = 0.008 if name.startswith("raised") else 0.03
        found["regression"] = [auc + gain for auc in found["regression"]]
    assert membership.differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("attack", "worse", "said"),
    [
        ("threshold", 1e-4, "threshold"),
        ("threshold", float("nan"), "threshold"),
        ("regression", 0.05, "regression"),
    ],
)
def test_what_does_not_agree_is_said(ours, attack, worse, said, tmp_path, capsys):
    theirs = copy.deepcopy(ours)
    found = theirs["raised, logits"]
    if attack == "threshold":
        found["threshold"] += worse
    else:
        found["regression"][0] += worse
    given, output = tmp_path / "theirs.json", tmp_path / "found.json"
    given.write_text(json.dumps(theirs))
    if np.isfinite(worse):
        assert membership.main([f"--theirs={given}", f"--output={output}"]) == 1
        assert f"raised, logits: {said}" in capsys.readouterr().out
        written = json.loads(output.read_text())
        assert (written["ours"], written["theirs"]) == (ours, theirs)
        assert len(written["differences"]) == 1
    else:
        assert len(membership.differences(ours, theirs)) == 1


def test_the_peer_attacks_what_was_written(ours, tmp_path, capsys):
    folder = tmp_path / "peers"
    program = (
        f"assert sys.argv[1] == {str(membership.ATTACKS)!r}\n"
        "assert open(sys.argv[2], 'rb').read(2) == b'PK'\n"
        "assert sys.argv[3:] == ['0', '1', '2']\n"
        f"print('by the way')\nprint({json.dumps(json.dumps(ours))})"
    )
    fake_peer(folder, program)
    output = tmp_path / "found.json"
    assert membership.main([f"--peers_dir={folder}", f"--output={output}"]) == 0
    assert "Agreed on 4 cases" in capsys.readouterr().out
    assert json.loads(output.read_text())["differences"] == []


@dataclasses.dataclass
class AttackInputData:
    """As the peer has it."""

    logits_train: np.ndarray
    logits_test: np.ndarray
    labels_train: np.ndarray
    labels_test: np.ndarray


def attacked(answers, *, attack_types):
    """Stands in for the peer: ours, which the regressions of a seed share."""
    assert len(attack_types) == 1
    parts = (answers.logits_train, answers.labels_train)
    found = membership.threshold_attack(
        membership.Answers(*parts, answers.logits_test, answers.labels_test)
    )
    single = SimpleNamespace(get_auc=lambda: found.auc)
    return SimpleNamespace(single_attack_results=[single])


def test_the_peers_script_reads_what_is_written(ours, tmp_path, monkeypatch):
    package = "tensorflow_privacy.privacy.privacy_tests.membership_inference_attack"
    kinds = SimpleNamespace(THRESHOLD_ATTACK="t", LOGISTIC_REGRESSION="lr")
    data = SimpleNamespace(AttackInputData=AttackInputData, AttackType=kinds)
    runs = SimpleNamespace(run_attacks=attacked)
    stand_in = SimpleNamespace(membership_inference_attack=runs)
    monkeypatch.setitem(sys.modules, package, stand_in)
    monkeypatch.setitem(sys.modules, f"{package}.data_structures", data)
    theirs = load("empirical_privacy_attacks", membership.ATTACKS)
    path, cases = tmp_path / "answers.npz", membership.make_cases()
    membership.write_answers(path, cases)
    found = theirs.main(path, "0", "1", "2")
    membership.check_theirs(found, cases)
    for name, aucs in found.items():
        assert aucs["threshold"] == ours[name]["threshold"]
        assert len(aucs["regression"]) == 3


@pytest.mark.parametrize("program", [None, "sys.exit('No module named peer')"])
def test_without_an_environment_that_works_it_says_so(tmp_path, capsys, program):
    if program is not None:
        fake_peer(tmp_path, program)
    with pytest.raises(SystemExit) as stopped:
        membership.main([f"--peers_dir={tmp_path}", f"--output={tmp_path / 'x.json'}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "`peers_dir`" in said
    assert ("needs a network" if program is None else "No module named peer") in said
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("text", ["[]", '{"alike": {}}', "no JSON"])
def test_figures_of_something_else_are_refused(tmp_path, capsys, text):
    (tmp_path / "theirs.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        membership.main([f"--theirs={tmp_path / 'theirs.json'}"])
    assert stopped.value.code == 2


def test_without_a_network_no_environment_is_complete(tmp_path, monkeypatch):
    tried = []

    def offline(command, **_):
        tried.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(environments.subprocess, "run", offline)
    with pytest.raises(SystemExit, match="could not install.*a network"):
        environments.main([f"--peers_dir={tmp_path}", "--peers=empirical_privacy"])
    assert len(tried) == 1
    assert list((tmp_path / "empirical_privacy").iterdir()) == []


def test_the_peer_comes_without_its_dependencies(tmp_path, monkeypatch):
    tried = []

    def online(command, **_):
        tried.append(command[4:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir())
    monkeypatch.setattr(environments.subprocess, "run", online)
    for _ in range(2):
        environments.main([f"--peers_dir={tmp_path}", "--peers=empirical_privacy"])
    first, second = tried  # and nothing the second time
    assert "numpy==1.26.4" in first and "--no-deps" not in first
    assert second == ["--no-deps", "tensorflow-empirical-privacy==0.1.0"]
