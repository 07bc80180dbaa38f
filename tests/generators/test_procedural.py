import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators import (
    DOMAINS,
    Blends,
    DeadLeaves,
    Mixture,
    PowerLawNoise,
    ProceduralGenerator,
    RandomStrokes,
    Silhouettes,
    SmoothNoise,
    default_prior,
)

SOURCES = [
    RandomStrokes,
    SmoothNoise,
    DeadLeaves,
    PowerLawNoise,
    Silhouettes,
]
SHAPES = [(28, 28, 1), (32, 32, 3), (20, 27, 3)]


def _mixture(shape, **kwargs):
    return Mixture([source(shape, **kwargs) for source in (RandomStrokes, SmoothNoise)])


def _blends(shape, **kwargs):
    return Blends(_mixture(shape, **kwargs))


def _images(generator, n=64, seed=(0, 1)):
    return generator.sample(n, tf.constant(seed)).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", [*SOURCES, _mixture, _blends])
def test_images_have_the_stated_shape_and_range(build, shape):
    generator = build(shape, output_range=(-1.0, 1.0))
    images = _images(generator, 16)
    assert images.shape == (16, *shape)
    assert images.dtype == np.float32
    assert np.all(np.isfinite(images))
    assert images.min() >= -1.0
    assert images.max() <= 1.0
    assert np.ptp(images) > 1.0  # the range is used, not only kept
    assert generator.image_shape == shape
    assert generator.output_range == (-1.0, 1.0)
    assert not generator.trainable


@pytest.mark.parametrize("build", [*SOURCES, _mixture, _blends])
def test_a_seed_gives_the_same_images_in_graph_and_eager_mode(build):
    generator = build((28, 28, 1))
    sample = tf.function(generator.sample)
    first = _images(generator, 8, (3, 4))
    np.testing.assert_array_equal(first, _images(generator, 8, (3, 4)))
    graph = sample(tf.constant(8), tf.constant([3, 4]))
    np.testing.assert_allclose(first, graph, atol=1e-4)
    for other in ((4, 3), (3, 5)):
        assert np.abs(first - _images(generator, 8, other)).mean() > 1e-3


@pytest.mark.parametrize("build", [*SOURCES, _mixture, _blends])
def test_images_of_one_batch_all_differ(build):
    images = _images(build((28, 28, 1)), 64).reshape(64, -1)
    images = images[images.std(axis=1) > 1e-3]
    assert len(images) >= 56  # hardly any is blank
    distances = np.abs(images[:, None] - images[None]).max(-1)
    assert distances[~np.eye(len(images), dtype=bool)].min() > 0.05


@pytest.mark.parametrize("build", [*SOURCES, _mixture, _blends])
def test_an_empty_batch_is_an_empty_batch(build):
    assert _images(build((28, 28, 1)), 0).shape == (0, 28, 28, 1)


@pytest.mark.parametrize("build", [*SOURCES, _mixture, _blends])
def test_config_restores_the_generator(build):
    generator = build((28, 28, 1), output_range=(0.0, 2.0))
    entry = keras.saving.serialize_keras_object(generator)
    restored = keras.saving.deserialize_keras_object(entry)
    assert isinstance(restored, ProceduralGenerator)
    assert restored.get_config() == generator.get_config()
    np.testing.assert_array_equal(_images(restored, 4), _images(generator, 4))


@pytest.mark.parametrize("source", SOURCES)
def test_every_argument_is_in_the_config_and_matters(source):
    config = source((28, 28, 1)).get_config()
    changes = {
        "strokes": (1, 1),
        "pen_radius": (3.0, 3.0),
        "extent": (0.5, 0.5),
        "connected": 0.0,
        "jitter": 0.3,
        "smoothness": (1.0, 1.0),
        "contrast": (0.3, 0.3),
        "threshold": (0.0, 0.0),
        "window": 1.0,
        "rounds": 1,
        "radius": (0.3, 0.4),
        "texture": 0.0,
        "background": 1.0,
        "exponent": (1.0, 1.0),
        "brightness": (0.5, 0.5),
        "symmetry": 0.0,
        "shading": 0.0,
        "striped": 0.0,
    }
    default = _images(source((28, 28, 1)))
    for name in set(config) - {"image_shape", "output_range"}:
        changed = source((28, 28, 1), **{name: changes[name]})
        assert np.abs(_images(changed) - default).max() > 0.01, name


def test_strokes_are_dark_ground_with_even_ink():
    images = _images(RandomStrokes((28, 28, 1)), 256)[..., 0]
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0]])
    assert border.mean() < 0.01
    covered = (images > 0.3).mean(axis=(1, 2))
    assert 0.04 < np.median(covered) < 0.3


def test_a_straight_thin_stroke_is_not_beaded():
    generator = RandomStrokes(
        (28, 28, 1), strokes=(1, 1), pen_radius=(0.8, 0.8), extent=(0.8, 0.8)
    )
    images = _images(generator, 200)[..., 0]
    tall = images[(images.max(axis=2) > 0).sum(axis=1) >= 20]
    # From the first inked row to the last, no row is without ink.
    for image in tall:
        rows = np.flatnonzero(image.max(axis=1) > 0.2)
        assert image[rows[0] : rows[-1] + 1].max(axis=1).min() > 0.2


def test_pens_draw_wider_on_larger_images():
    small = _images(RandomStrokes((28, 28, 1)), 128)
    large = _images(RandomStrokes((56, 56, 1)), 128)
    assert abs(small.mean() - large.mean()) < 0.02


def test_smoother_noise_has_smaller_steps():
    def step(sigma):
        generator = SmoothNoise(
            (28, 28, 1), smoothness=(sigma, sigma), contrast=(1, 1), window=0.0
        )
        return np.abs(np.diff(_images(generator), axis=1)).mean()

    assert step(1.0) > 2.0 * step(4.0)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_power_law_noise_has_its_spectrum(exponent):
    generator = PowerLawNoise(
        (64, 64, 1),
        exponent=(exponent, exponent),
        contrast=(0.1, 0.1),
        brightness=(0.5, 0.5),
    )
    spectrum = np.abs(np.fft.rfft2(_images(generator, 64)[..., 0]))
    amplitude = np.sqrt(np.square(spectrum).mean(axis=0))[0]
    frequency = np.arange(4, 24)
    slope = np.polyfit(np.log(frequency), np.log(amplitude[4:24]), 1)[0]
    assert abs(slope + exponent) < 0.15


def test_leaves_are_flat_where_they_are_not_striped():
    images = _images(DeadLeaves((28, 28, 1), texture=0.0, background=0.0), 32)
    flat = np.abs(np.diff(images, axis=2)) < 1e-6
    assert flat.mean() > 0.4


def test_mirrored_silhouettes_are_their_own_mirror_image():
    outline = {"shading": 0.0, "striped": 0.0}
    images = _images(Silhouettes((28, 28, 1), symmetry=1.0, **outline))
    np.testing.assert_allclose(images, images[:, :, ::-1], atol=1e-4)
    images = _images(Silhouettes((28, 28, 1), symmetry=0.0, **outline))
    lopsided = np.abs(images - images[:, :, ::-1]).mean(axis=(1, 2, 3))
    assert np.median(lopsided) > 0.01


class _Constant(ProceduralGenerator):
    """Images of one value: shows where an image of a mixture comes from."""

    def __init__(self, value, side=2):
        super().__init__((side, side, 1))
        self.value = value

    def draw(self, draws):
        return self.value * tf.ones([draws.n, *self.image_shape])


def test_a_mixture_keeps_its_proportions_in_every_batch():
    mixture = Mixture(
        [_Constant(0.1), _Constant(0.5), _Constant(0.9)], weights=[2, 1, 1]
    )
    for seed in range(5):
        values = _images(mixture, 40, (0, seed))[:, 0, 0, 0]
        counts = [np.isclose(values, value).sum() for value in (0.1, 0.5, 0.9)]
        assert counts == [20, 10, 10]


def test_a_mixture_is_fair_on_average_and_shuffled():
    mixture = Mixture([_Constant(0.1), _Constant(0.9)], weights=[0.3, 0.7])
    ones = [_images(mixture, 1, (1, s))[0, 0, 0, 0] > 0.5 for s in range(300)]
    assert 0.62 < np.mean(ones) < 0.78
    first_half = [_images(mixture, 20, (2, s))[:10].mean() for s in range(20)]
    assert abs(np.mean(first_half) - (0.3 * 0.1 + 0.7 * 0.9)) < 0.06


_PLAIN = {"blended": 0.0, "sharpened": 0.0, "toned": 0.0, "grained": 0.0}


def _only(generator, **kwargs):
    """`Blends` that does nothing but what is asked for."""
    return Blends(generator, **{**_PLAIN, **kwargs})


def test_blends_hold_two_images_and_leave_the_stated_share_alone():
    leaves = DeadLeaves((28, 28, 1))
    untouched = _only(leaves)
    # The inner generator draws from a sub-seed of its own: compare in distribution.
    alone = np.sort(_images(leaves, 400).mean(axis=(1, 2, 3)))
    same = np.sort(_images(untouched, 400).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(alone, same, atol=0.15)
    mixed = _images(_only(leaves, blended=0.5), 400)
    plain = _images(untouched, 400)  # the same draws of the inner generator
    kept = np.isclose(mixed, plain, atol=1e-6).all(axis=(1, 2, 3)).mean()
    assert 0.4 < kept < 0.6


def test_sharpening_raises_contrast_at_edges_and_keeps_flat_areas():
    soft = _images(_only(SmoothNoise((28, 28, 1))), 64)
    sharp = _images(_only(SmoothNoise((28, 28, 1)), sharpened=3.0), 64)
    assert np.abs(np.diff(sharp, axis=1)).mean() > np.abs(np.diff(soft, axis=1)).mean()
    flat = _only(_Constant(0.5), sharpened=3.0)
    np.testing.assert_allclose(_images(flat, 4), 0.5, atol=1e-6)


def test_toning_lightens_images_keeps_the_order_of_pixels_and_leaves_black_alone():
    plain = _images(_only(SmoothNoise((28, 28, 1))), 64)
    toned = _images(_only(SmoothNoise((28, 28, 1)), toned=1.0), 64)
    assert toned.max(axis=(1, 2, 3)).min() >= 0.6 - 1e-6
    for before, after in zip(plain, toned, strict=True):
        order = np.argsort(before, axis=None)
        assert (np.diff(after.ravel()[order]) >= -1e-6).all()
    np.testing.assert_array_equal(_images(_only(_Constant(0.0), toned=1.0), 4), 0.0)
    some = _images(_only(SmoothNoise((28, 28, 1)), toned=0.5), 400)
    plain = _images(_only(SmoothNoise((28, 28, 1))), 400)
    kept = np.isclose(some, plain, atol=1e-6).all(axis=(1, 2, 3)).mean()
    assert 0.4 < kept < 0.6


def test_grain_is_in_proportion_to_the_pixel_and_its_mean_is_zero():
    light = _images(_only(_Constant(0.3, side=28), grained=1.0), 400)
    dark = _images(_only(_Constant(0.15, side=28), grained=1.0), 400)
    np.testing.assert_allclose(light, 2.0 * dark, atol=1e-5)  # the same draws
    spread = light.std(axis=(1, 2, 3)) / 0.3
    assert 0.005 < spread.min() < 0.02 and 0.2 < spread.max() < 0.4
    assert abs(light.mean() - 0.3) < 0.003
    black = _only(_Constant(0.0), grained=1.0)
    np.testing.assert_array_equal(_images(black, 4), 0.0)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: RandomStrokes((28, 28)), "image_shape"),
        (lambda: Blends(SmoothNoise((28, 28, 1)), blended=1.5), "blended"),
        (lambda: Blends(SmoothNoise((28, 28, 1)), sharpened=-1.0), "sharpened"),
        (lambda: Blends(SmoothNoise((28, 28, 1)), toned=-0.1), "toned"),
        (lambda: Blends(SmoothNoise((28, 28, 1)), grained=2.0), "grained"),
        (lambda: RandomStrokes((28, 0, 1)), "image_shape"),
        (lambda: SmoothNoise((28, 28, 1), output_range=(1, 1)), "output_range"),
        (lambda: SmoothNoise((28, 28, 1), output_range=(0, np.nan)), "output_range"),
        (lambda: RandomStrokes((28, 28, 1), strokes=(0, 2)), "strokes"),
        (lambda: RandomStrokes((28, 28, 1), pen_radius=(2, 1)), "pen_radius"),
        (lambda: RandomStrokes((28, 28, 1), connected=1.5), "connected"),
        (lambda: DeadLeaves((28, 28, 1), rounds=0), "rounds"),
        (lambda: Mixture([]), "generators"),
        (
            lambda: Mixture([SmoothNoise((28, 28, 1)), SmoothNoise((32, 32, 3))]),
            "generators",
        ),
        (lambda: Mixture([SmoothNoise((28, 28, 1))], weights=[0.0]), "weights"),
        (lambda: Mixture([SmoothNoise((28, 28, 1))], weights=[1, 2]), "weights"),
    ],
)
def test_bad_arguments_are_named(build, argument):
    with pytest.raises(ValueError, match=f"Invalid value for argument `{argument}`"):
        build()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 32, 3)])
def test_default_priors_fit_any_image_shape(domain, image_shape):
    prior = default_prior(image_shape, domain=domain, output_range=(-1.0, 1.0))
    images = prior.sample(40, tf.constant([1, 2])).numpy()
    assert images.shape == (40, *image_shape)
    assert -1.0 <= images.min() < images.max() <= 1.0
    assert images.std(axis=0).mean() > 0.1  # not all alike
    assert prior.from_config(prior.get_config()).get_config() == prior.get_config()


def test_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="domain"):
        default_prior((28, 28, 1), domain="faces")
