"""A distilled data set as a teacher: the same answers, the same guarantee."""

import numpy as np
import pytest

from dp_transcribe import ridge_teacher
from dp_transcribe.distillation import (
    DistilledDataset,
    InterceptKernel,
    KernelRidgeClassifier,
    MirroredKernel,
    RBFKernel,
    ScatteringKernel,
)
from dp_transcribe.teachers import load_teacher
from tests.private_teachers.test_scattering import SHAPE, fit, images, striped

SCATTERING = ScatteringKernel(SHAPE)
KERNELS = [
    SCATTERING,
    InterceptKernel(SCATTERING, length=0.5),
    InterceptKernel(MirroredKernel(SCATTERING)),
]


@pytest.fixture(scope="module")
def statement():
    return fit(*striped(300)).statement


@pytest.fixture
def distilled(statement):
    return DistilledDataset(images(6), np.array([0, 0, 1, 1, 2, 2]), 3, statement)


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_answers_as_ridge_regression_does(distilled, kernel):
    ridge = KernelRidgeClassifier(kernel, penalty=0.1)
    ridge.fit(distilled.images, distilled.labels)
    teacher = ridge_teacher(distilled, kernel, penalty=0.1, sharpness=4.0)
    pixels = images(150, seed=1)
    expected = 4.0 * ridge.decision_function(pixels)
    np.testing.assert_allclose(teacher.logits(pixels), expected, atol=1e-4)


def test_it_has_the_guarantee_of_the_images(distilled, statement, tmp_path):
    teacher = ridge_teacher(distilled, KERNELS[1])
    assert teacher.statement.epsilon == statement.epsilon
    assert teacher.statement.unit is statement.unit
    assert "teacher" in teacher.statement.covered
    teacher.save(tmp_path / "teacher.keras")
    loaded = load_teacher(tmp_path / "teacher.keras")
    pixels = images(20, seed=2)
    np.testing.assert_allclose(
        loaded.predict(pixels), teacher.predict(pixels), atol=1e-5
    )


def test_what_does_not_fit_is_refused(distilled, statement):
    with pytest.raises(ValueError, match="`kernel`"):
        ridge_teacher(distilled, RBFKernel())
    with pytest.raises(ValueError, match="`sharpness`"):
        ridge_teacher(distilled, SCATTERING, sharpness=0.0)
    lacking = DistilledDataset(images(4), np.array([0, 0, 2, 2]), 3, statement)
    with pytest.raises(ValueError, match="each of 3 classes"):
        ridge_teacher(lacking, SCATTERING)
