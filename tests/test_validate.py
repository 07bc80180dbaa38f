"""Plain values: what is accepted, what is refused, and how the refusal reads."""

import math

import numpy as np
import pytest

from dp_transcribe import _validate

NOT_NUMBERS = [math.nan, math.inf, -math.inf, None, "1", True, [1.0]]


def test_wording_names_argument_expectation_value_and_mend():
    with pytest.raises(ValueError) as caught:
        _validate.positive_finite("epsilon", -1.0, "Give a budget above 0.")
    assert str(caught.value) == (
        "Invalid value for argument `epsilon`. Expected a finite number greater "
        "than 0. Received: epsilon=-1.0. Give a budget above 0."
    )


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 0.0, -1])
def test_positive_finite_refuses(value):
    with pytest.raises(ValueError, match="`x`"):
        _validate.positive_finite("x", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1e-9])
def test_non_negative_refuses(value):
    with pytest.raises(ValueError, match="`x`"):
        _validate.non_negative("x", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 1, 1.0, -0.1, 2])
def test_fraction_open_refuses(value):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        _validate.fraction_open("delta", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -0.1, 1.1])
def test_probability_refuses(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        _validate.probability("q", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 1.0, 2.5])
def test_positive_int_refuses(value):
    with pytest.raises(ValueError, match="whole number of 1 or more"):
        _validate.positive_int("n", value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1, 0.0])
def test_non_negative_int_refuses(value):
    with pytest.raises(ValueError, match="whole number of 0 or more"):
        _validate.non_negative_int("n", value)


@pytest.mark.parametrize("value", [0, 11, -1, 2.0, True, None])
def test_number_of_candidate_classes_out_of_range(value):
    with pytest.raises(ValueError, match="whole number from 1 to 10"):
        _validate.in_range("k", value, 1, 10)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", 2**63])
def test_seed_refuses(value):
    with pytest.raises(ValueError, match="secret entropy"):
        _validate.optional_seed("seed", value)


@pytest.mark.parametrize(
    "text", ["", "0", "0,1,2", "0;255", "1,0", "1,1", "nan,1", "0,inf", "low,high"]
)
def test_written_range_refuses(text):
    with pytest.raises(ValueError, match="`pixels`.*low,high with low < high"):
        _validate.written_range("pixels", text)


def test_written_ranges():
    assert _validate.written_range("pixels", "-1, 1") == (-1.0, 1.0)
    assert _validate.written_range("pixels", None) == (0.0, 1.0)


def test_accepted_values_come_back_as_plain_python():
    cases = [
        (_validate.positive_finite("x", np.float32(0.5)), 0.5, float),
        (_validate.positive_finite("x", 3), 3.0, float),
        (_validate.non_negative("x", 0), 0.0, float),
        (_validate.fraction_open("x", 1e-5), 1e-5, float),
        (_validate.probability("x", 1), 1.0, float),
        (_validate.positive_int("x", np.int64(1)), 1, int),
        (_validate.non_negative_int("x", 0), 0, int),
        (_validate.in_range("x", np.int32(10), 1, 10), 10, int),
        (_validate.optional_seed("x", np.int64(7)), 7, int),
    ]
    for value, expected, kind in cases:
        assert value == expected
        assert type(value) is kind
    assert _validate.optional_seed("x", None) is None


def test_one_of():
    assert _validate.one_of("method", "srr", ("dpdfd", "srr")) == "srr"
    with pytest.raises(ValueError, match="one of 'dpdfd', 'srr'. Received.*'SRR'"):
        _validate.one_of("method", "SRR", ("dpdfd", "srr"))
    with pytest.raises(ValueError, match="one of 1"):
        _validate.one_of("format", True, (1,))


def test_instance_of():
    assert _validate.instance_of("x", 3, (int, str)) == 3
    with pytest.raises(ValueError, match="an instance of `int` or `str`"):
        _validate.instance_of("x", 3.0, (int, str))


def test_writable_dir_creates_and_leaves_nothing_behind(tmp_path):
    folder = _validate.writable_dir("output_dir", str(tmp_path / "a" / "b"))
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_writable_dir_refuses_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match="`output_dir`.*a writable folder"):
            _validate.writable_dir("output_dir", path)


def test_writable_file_makes_the_folder_and_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "log.csv"
    assert _validate.writable_file("filename", str(path)) == path
    assert path.parent.is_dir() and not path.exists()
    path.write_text("kept")
    _validate.writable_file("filename", path)
    assert path.read_text() == "kept"


def test_writable_file_refuses_a_folder(tmp_path):
    with pytest.raises(ValueError, match="`filename`.*a writable file"):
        _validate.writable_file("filename", tmp_path)
