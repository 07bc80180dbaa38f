import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators import Bags, Footwear, Garments

SOURCES = [Garments, Footwear, Bags]


def _images(generator, n=64, seed=(0, 1)):
    return generator.sample(n, tf.constant(seed)).numpy()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 24, 3)])
def test_objects_on_black_of_the_stated_shape_and_range(source, shape):
    images = _images(source(shape, output_range=(-1.0, 1.0)), 48)
    assert images.shape == (48, *shape)
    assert np.all(np.isfinite(images))
    assert images.min() == pytest.approx(-1.0, abs=1e-3)
    assert images.max() <= 1.0
    lit = (images > -0.9).any(axis=-1).mean(axis=(1, 2))
    assert (lit > 0.03).mean() > 0.9  # hardly any is blank
    assert np.median(lit) < 0.8  # most have some ground left


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_gives_the_same_images_in_graph_and_eager_mode(source):
    generator = source((28, 28, 1))
    first = _images(generator, 8, (3, 4))
    graph = tf.function(generator.sample)(tf.constant(8), tf.constant([3, 4]))
    np.testing.assert_allclose(first, graph, atol=1e-3)
    assert np.abs(first - _images(generator, 8, (4, 3))).mean() > 1e-2
    assert _images(generator, 0).shape == (0, 28, 28, 1)


@pytest.mark.parametrize("source", SOURCES)
def test_config_restores_the_generator(source):
    generator = source((28, 28, 1), crumpled=0.1, patterned=0.5)
    entry = keras.saving.serialize_keras_object(generator)
    restored = keras.saving.deserialize_keras_object(entry)
    assert restored.get_config() == generator.get_config()
    np.testing.assert_array_equal(_images(restored, 4), _images(generator, 4))


@pytest.mark.parametrize("source", SOURCES)
def test_every_argument_is_in_the_config_and_matters(source):
    default = _images(source((28, 28, 1)))
    config = source((28, 28, 1)).get_config()
    for name in set(config) - {"image_shape", "output_range"}:
        changed = _images(source((28, 28, 1), **{name: 0.0}))
        assert np.abs(changed - default).max() > 0.05, name
        with pytest.raises(ValueError, match=f"argument `{name}`"):
            source((28, 28, 1), **{name: -0.1})


def test_uncrumpled_torsos_are_their_own_mirror_image():
    plain = {"trousers": 0.0, "fronts": 0.0, "crumpled": 0.0}
    mask = _images(Garments((28, 28, 1), **plain), 200)[..., 0] > 0.02
    assert (mask == mask[:, :, ::-1]).mean() > 0.97


def test_trousers_part_below_and_torsos_do_not():
    def split(trousers):
        generator = Garments((28, 28, 1), trousers=trousers, sleeves=0.0, crumpled=0.0)
        mask = _images(generator, 200)[..., 0] > 0.05
        middle, beside = mask[:, 20, 13:15].all(axis=1), mask[:, 20].any(axis=1)
        return (beside & ~middle).mean()

    assert split(1.0) > split(0.0) + 0.3


def test_boots_are_taller_than_shoes():
    def tall(boots):
        generator = Footwear((28, 28, 1), boots=boots, heels=0.0, crumpled=0.0)
        mask = _images(generator, 200)[..., 0] > 0.02
        return mask.any(axis=2).sum(axis=1).mean()

    assert tall(1.0) > tall(0.0) + 4


def test_shoes_face_the_side_they_are_told_to():
    def shaft(facing_left):
        generator = Footwear((28, 28, 1), boots=1.0, facing_left=facing_left)
        top = _images(generator, 200)[:, :12, :, 0].sum(axis=(0, 1))
        return top[14:].sum() / top.sum()

    assert shaft(1.0) > 0.7
    assert shaft(0.0) < 0.3


def test_handles_stand_above_the_body_of_a_bag():
    def holes(handles):
        generator = Bags((28, 28, 1), handles=handles, flaps=0.0, crumpled=0.0)
        mask = _images(generator, 200)[..., 0] > 0.02
        below = np.maximum.accumulate(mask, axis=1)
        return (~mask & below)[:, :20, 10:18].mean()

    assert holes(1.0) > holes(0.0) + 0.02
