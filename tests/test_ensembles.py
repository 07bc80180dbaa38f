"""Shards are disjoint, training resumes, and an ensemble answers as its members do."""

import dataclasses
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import shards as shards_module
from dp_transcribe.ensembles import ShardPlan, TeacherEnsemble
from dp_transcribe.generators.conv_generator import ConvGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.shards import (
    RidgeFit,
    ShardTraining,
    linear_member,
    train_shard_teachers,
)
from tests import tiny

RECORDS, SHARDS = 120, 6


def member():
    return tiny.linear_model(0, 0.1)


def private_data(seed=0, records=RECORDS):
    """Images whose class is written into their first pixels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, tiny.CLASSES, records)
    images = random.uniform(0, 0.3, (records, *tiny.IMAGE)).astype(np.float32)
    images.reshape(records, -1)[np.arange(records), labels] += 0.7
    return images, labels


def small_ensemble(**kwargs):
    return train_shard_teachers(
        member, private_data(), shards=SHARDS, fit=RidgeFit(), **kwargs
    )


@pytest.mark.parametrize("records, shards", [(120, 6), (101, 7), (50, 50), (9, 2)])
def test_every_record_is_in_exactly_one_shard(records, shards):
    plan = ShardPlan(records, shards)
    parts = [plan.indices(shard) for shard in range(shards)]
    assert sorted(np.concatenate(parts)) == list(range(records))
    assert plan.shards_of_records().tolist() == [1] * records
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_record_in_two_shards_is_counted(monkeypatch):
    own = ShardPlan.indices
    first = {0: own(ShardPlan(9, 3), 0)[0], 2: own(ShardPlan(9, 3), 0)[0]}
    monkeypatch.setattr(
        ShardPlan,
        "indices",
        lambda self, shard: np.append(own(self, shard), first.get(shard, [])).astype(
            np.int64
        ),
    )
    counts = ShardPlan(9, 3).shards_of_records()
    assert np.flatnonzero(counts == 2).tolist() == [first[0]]
    assert counts.sum() == 10


def test_the_split_is_public_and_not_the_order_of_the_records():
    plan = ShardPlan(1000, 10)
    assert np.array_equal(plan.indices(3), ShardPlan(1000, 10).indices(3))
    assert not np.array_equal(plan.indices(3), ShardPlan(1000, 10, seed=1).indices(3))
    assert len(np.unique(plan.indices(3) // 100)) > 5


@pytest.mark.parametrize("shards", [1, 0, 121, 2.5])
def test_impossible_numbers_of_shards_are_refused(shards):
    with pytest.raises(ValueError, match="shards"):
        ShardPlan(RECORDS, shards)


def compiled_once(model, inputs, labels):
    """As a user writes it: Adam's moments stay in the model."""
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(inputs, labels, epochs=2, verbose=0)


@pytest.mark.parametrize("fit", [RidgeFit(), ShardTraining(epochs=2), compiled_once])
def test_one_record_changes_one_teacher(fit):
    images, labels = private_data()
    other, record = images.copy(), 17
    other[record] = 1.0 - other[record]
    relabelled = labels.copy()
    relabelled[record] = (relabelled[record] + 1) % tiny.CLASSES
    first, second = (
        train_shard_teachers(member, data, shards=SHARDS, fit=fit).get_weights()
        for data in ((images, labels), (other, relabelled))
    )
    changed = [
        shard
        for shard in range(SHARDS)
        if any(np.any(a[shard] != b[shard]) for a, b in zip(first, second, strict=True))
    ]
    (shard,) = changed
    assert record in ShardPlan(RECORDS, SHARDS).indices(shard)


@pytest.mark.parametrize("fit, models", [(RidgeFit(), 1), (compiled_once, SHARDS)])
def test_a_fit_that_may_keep_state_gets_a_new_model_for_each_shard(fit, models):
    made = []

    def new_member():
        made.append(member())
        return made[-1]

    train_shard_teachers(new_member, private_data(), shards=SHARDS, fit=fit)
    assert len(made) == models + 2  # one for its shapes, one for the ensemble


def members_on_one_backbone():
    """A function of members that share their first layer, as pretrained ones do."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    backbone = layers.Dense(5, activation="tanh")
    backbone.build((None, tiny.PIXELS))

    def new_member():
        return keras.Sequential(
            [
                layers.Input(tiny.IMAGE),
                layers.Flatten(),
                backbone,
                layers.Dense(tiny.CLASSES),
            ]
        )

    return new_member, backbone


def failing(model, inputs, labels):
    compiled_once(model, inputs, labels)
    raise KeyboardInterrupt


@pytest.mark.parametrize("fit", [ShardTraining(epochs=1), compiled_once])
def test_layers_that_members_share_carry_no_record_to_another_teacher(fit):
    def trained(make, data):
        return train_shard_teachers(make, data, shards=SHARDS, fit=fit).get_weights()

    make, backbone = members_on_one_backbone()
    public = [weight.copy() for weight in backbone.get_weights()]
    images, labels = private_data()
    first = trained(make, (images, labels))
    for one, other in zip(public, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    record = ShardPlan(RECORDS, SHARDS).indices(0)[0]
    images[record] = 1.0 - images[record]
    second = trained(make, (images, labels))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[1:], other[1:])
    assert np.any(first[0][0] != second[0][0])


def test_an_interrupted_training_leaves_nothing_in_shared_layers():
    make, backbone = members_on_one_backbone()
    public = [weight.copy() for weight in backbone.get_weights()]
    with pytest.raises(KeyboardInterrupt):
        train_shard_teachers(make, private_data(), shards=SHARDS, fit=failing)
    for one, other in zip(public, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_model_made_twice_is_refused():
    model = member()
    with pytest.raises(ValueError, match="model_fn"):
        train_shard_teachers(
            lambda: model, private_data(), shards=SHARDS, fit=compiled_once
        )


@dataclasses.dataclass(frozen=True)
class Interrupted:
    """Trains `limit` teachers, then is interrupted."""

    limit: int = dataclasses.field(repr=False)
    trained: list = dataclasses.field(default_factory=list, repr=False)

    def __call__(self, model, inputs, labels):
        if len(self.trained) == self.limit:
            raise KeyboardInterrupt
        self.trained.append(len(inputs))
        ShardTraining(epochs=2)(model, inputs, labels)


def train(fit, **kwargs):
    return train_shard_teachers(
        member, private_data(), shards=SHARDS, fit=fit, **kwargs
    )


def test_training_resumes_where_it_stopped_with_the_same_teachers(tmp_path):
    whole = train(Interrupted(SHARDS)).get_weights()
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted(3), folder=tmp_path)
    assert len(list(tmp_path.glob("teacher_*.npz"))) == 3
    (tmp_path / "teacher_00001.npz").write_bytes(b"half a file")
    rest = Interrupted(99)
    resumed = train(rest, folder=tmp_path)
    assert len(rest.trained) == SHARDS - 3 + 1
    for one, other in zip(whole, resumed.get_weights(), strict=True):
        assert np.array_equal(one, other)
    assert not list(tmp_path.glob(".partial*"))


def forgetful_member():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(tiny.IMAGE),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(tiny.CLASSES),
        ]
    )


def test_teachers_with_dropout_are_trained_anew_as_before(tmp_path):
    def trained():
        return train_shard_teachers(
            forgetful_member,
            private_data(),
            shards=SHARDS,
            fit=ShardTraining(epochs=2),
            folder=tmp_path,
        ).get_weights()

    whole = trained()
    for lost in (1, 3):
        (tmp_path / f"teacher_{lost:05d}.npz").unlink()
    for one, other in zip(whole, trained(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": private_data(1)},
        {"shards": 5},
        {"seed": 1},
        {"fit": RidgeFit(penalty=1.0)},
        {"model_fn": lambda: tiny.conv_model()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_folder_of_other_teachers_is_refused(tmp_path, change):
    arguments = {
        "model_fn": member,
        "dataset": private_data(),
        "shards": SHARDS,
        "fit": RidgeFit(),
        "folder": tmp_path,
    }
    train_shard_teachers(**arguments)
    with pytest.raises(ValueError, match="folder"):
        train_shard_teachers(**{**arguments, **change})


def test_teachers_of_which_nothing_is_told_are_not_adopted(tmp_path):
    small_ensemble(folder=tmp_path)
    (tmp_path / shards_module.MANIFEST).unlink()
    with pytest.raises(ValueError, match="folder"):
        train_shard_teachers(
            member,
            private_data(1),
            shards=SHARDS,
            fit=RidgeFit(),
            folder=tmp_path,
            seed=1,
        )


@pytest.mark.slow
def test_processes_train_the_same_teachers(tmp_path):
    alone = small_ensemble().get_weights()
    together = small_ensemble(folder=tmp_path, processes=2).get_weights()
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


class Gpus:
    """Stands for TensorFlow's configuration of so many GPUs."""

    def __init__(self, monkeypatch, count, in_use=False):
        self.names = [f"GPU:{index}" for index in range(count)]
        self.in_use, self.visible, self.growing = in_use, self.names, []
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: self.names)
        monkeypatch.setattr(tf.config, "set_visible_devices", self.see)
        monkeypatch.setattr(tf.config.experimental, "set_memory_growth", self.grow)

    def see(self, device, kind):
        self.refuse_if_in_use()
        assert kind == "GPU"
        self.visible = [device]

    def grow(self, device, enable):
        self.refuse_if_in_use()
        assert enable
        self.growing.append(device)

    def refuse_if_in_use(self):
        if self.in_use:
            raise RuntimeError("devices cannot be modified after being initialized")


@pytest.mark.parametrize("gpus, seen", [(1, [0, 0, 0, 0]), (3, [0, 1, 2, 0])])
def test_each_process_sees_one_gpu_whose_memory_grows(gpus, seen, monkeypatch):
    for number, index in enumerate(seen):
        found = Gpus(monkeypatch, gpus)
        shards_module._see_one_gpu(number, len(seen))
        assert found.visible == found.growing == [f"GPU:{index}"]


def test_without_gpus_a_process_keeps_its_devices():
    before = tf.config.get_visible_devices()
    shards_module._see_one_gpu(1, 2)
    assert tf.config.get_visible_devices() == before


def test_a_process_whose_gpu_comes_too_late_is_refused(monkeypatch):
    Gpus(monkeypatch, 2, in_use=True)
    with pytest.raises(ValueError, match="`processes`"):
        shards_module._see_one_gpu(0, 2)


@pytest.mark.parametrize("variable, warned", [("true", False), ("", True)])
def test_memory_that_the_caller_holds_is_told(variable, warned, monkeypatch, caplog):
    found = Gpus(monkeypatch, 2)
    shards_module._leave_gpu_memory()
    assert found.growing == found.names and not caplog.records
    Gpus(monkeypatch, 2, in_use=True)
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", variable)
    shards_module._leave_gpu_memory()
    assert ("TF_FORCE_GPU_ALLOW_GROWTH" in caplog.text) == warned


def test_one_process_leaves_the_devices_alone(monkeypatch):
    found = Gpus(monkeypatch, 2, in_use=True)
    small_ensemble()
    assert found.visible == found.names


def note_gpu(number, processes):
    """In a process that trains: what it would see of two GPUs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = Gpus(monkeypatch, 2)
        SEE_ONE_GPU(number, processes)
    Path(os.environ["NOTES"], f"{os.getpid()}.gpu").write_text(*found.visible)


@dataclasses.dataclass(frozen=True)
class NotedFit:
    """Notes where it runs, and the first label of its shard."""

    def __call__(self, model, inputs, labels):
        RidgeFit()(model, inputs, labels)
        with Path(os.environ["NOTES"], f"{os.getpid()}.fit").open("a") as notes:
            print(labels[0], file=notes)


SEE_ONE_GPU = shards_module._see_one_gpu


@pytest.mark.slow
def test_shards_are_spread_over_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setattr(shards_module, "_see_one_gpu", note_gpu)
    images, labels = private_data()
    first = [ShardPlan(RECORDS, SHARDS).indices(shard)[0] for shard in range(SHARDS)]
    train(NotedFit(), processes=2)
    trained = {}
    for path in tmp_path.glob("*.gpu"):
        trained[path.read_text()] = path.with_suffix(".fit").read_text().split()
    assert trained == {
        f"GPU:{gpu}": [str(labels[i]) for i in first[gpu::2]] for gpu in range(2)
    }


def test_a_dataset_of_single_examples_is_taken_too():
    dataset = tf.data.Dataset.from_tensor_slices(private_data())
    other = train_shard_teachers(member, dataset, shards=SHARDS, fit=RidgeFit())
    for one, two in zip(
        small_ensemble().get_weights(), other.get_weights(), strict=True
    ):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("labels", [np.zeros(RECORDS), np.zeros((RECORDS, 1), int)])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match="dataset"):
        train_shard_teachers(member, (private_data()[0], labels), shards=SHARDS)


def models_of(ensemble, make):
    """The members as separate models."""
    models = []
    for shard in range(ensemble.num_teachers):
        model = make()
        model.set_weights([w[shard] for w in ensemble.get_weights()])
        models.append(model)
    return models


@pytest.mark.parametrize("make", [member, tiny.conv_model], ids=["dense", "conv"])
def test_one_pass_answers_as_the_members_one_by_one(make):
    random = np.random.default_rng(0)
    weights = [random.normal(size=(4, *v.shape)) for v in make().variables]
    ensemble = TeacherEnsemble(make(), [w.astype(np.float32) for w in weights])
    images = private_data()[0][:7]
    singly = np.stack([m(images).numpy() for m in models_of(ensemble, make)], 1)
    together = ensemble.member_logits(images).numpy()
    assert together.shape == (7, 4, tiny.CLASSES)
    assert np.allclose(together, singly, atol=1e-4)
    votes = np.eye(tiny.CLASSES)[singly.argmax(-1)].sum(1)
    assert np.array_equal(ensemble.votes(images), votes)
    assert np.allclose(ensemble.probabilities(images), votes / 4)
    assert np.allclose(ensemble.predict(images), votes / 4)
    assert np.allclose(ensemble.member_probabilities(images).numpy().sum(-1), 1)


@pytest.mark.parametrize("name", ["model_fn", "features"])
def test_statistics_of_all_records_are_refused(name):
    """Each teacher, or what it is asked through, would depend on every record."""
    images, labels = private_data()
    layer = keras.layers.Normalization(axis=None, name="the_culprit")
    layer.adapt(images)
    inputs = keras.layers.Input(tiny.IMAGE)
    adapted = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    dense = keras.layers.Dense(tiny.CLASSES)
    models = {
        "model_fn": {"model_fn": lambda: keras.Sequential([adapted, dense])},
        "features": {
            "model_fn": lambda: linear_member(tiny.PIXELS, tiny.CLASSES),
            "features": adapted,
        },
    }
    with pytest.raises(ValueError, match=f"`{name}`.*`adapt`.*the_culprit"):
        train_shard_teachers(
            dataset=(images, labels), shards=SHARDS, fit=RidgeFit(), **models[name]
        )


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_features_that_let_records_meet_are_refused(dtype):
    inputs = keras.layers.Input(tiny.IMAGE)
    flat = keras.layers.Flatten()(inputs)
    pixels = (private_data()[0] * 255).astype(dtype), private_data()[1]

    def trained(along):
        normalized = keras.layers.UnitNormalization(along)(flat)
        return train_shard_teachers(
            lambda: linear_member(tiny.PIXELS, tiny.CLASSES),
            pixels,
            shards=SHARDS,
            fit=RidgeFit(),
            features=keras.Model(inputs, normalized),
        )

    trained(-1)
    with pytest.raises(ValueError, match="`features`"):
        trained(0)


def test_shared_features_are_applied_before_the_members():
    halve = keras.Sequential(
        [keras.layers.Input(tiny.IMAGE), keras.layers.AveragePooling2D(2)]
    )

    def small_member():
        return keras.Sequential(
            [keras.layers.Input((4, 4, 1)), keras.layers.Flatten()]
            + [keras.layers.Dense(tiny.CLASSES)]
        )

    ensemble = train_shard_teachers(
        small_member, private_data(), shards=SHARDS, fit=RidgeFit(), features=halve
    )
    images = private_data()[0][:5]
    assert ensemble.input_shape == tiny.IMAGE
    for index, model in enumerate(models_of(ensemble, small_member)):
        expected = model(halve(images))
        assert np.allclose(
            ensemble.member_logits(images)[:, index], expected, atol=1e-5
        )


def test_ridge_teachers_learn():
    images, labels = private_data(3)
    assert small_ensemble().accuracy(images, labels) > 0.9


def test_ridge_wants_one_dense_layer():
    with pytest.raises(ValueError, match="dense layer"):
        train_shard_teachers(
            tiny.conv_model, private_data(), shards=SHARDS, fit=RidgeFit()
        )


def test_a_saved_ensemble_answers_as_before():
    ensemble = small_ensemble()
    other = TeacherEnsemble.from_config(ensemble.get_config())
    other.set_weights(ensemble.get_weights())
    images = private_data()[0][:5]
    assert np.array_equal(other.votes(images), ensemble.votes(images))
    assert other.num_teachers == SHARDS


def test_weights_that_do_not_fit_the_member_are_refused():
    weights = small_ensemble().get_weights()
    with pytest.raises(ValueError, match="weights"):
        TeacherEnsemble(member(), [weights[0], weights[1][:-1]])
    with pytest.raises(ValueError, match="weights"):
        TeacherEnsemble(member(), weights[:1])


def test_an_ensemble_guides_no_generator():
    ensemble = small_ensemble()
    with pytest.raises(ValueError, match="student"):
        ensemble.logits(private_data()[0][:2])
    generator = ConvGenerator(tiny.IMAGE)
    before = tiny.flat_weights(generator)
    with pytest.raises(ValueError, match="ensemble"):
        pretrain_by_teacher(generator, ensemble, steps=1)
    assert np.array_equal(before, tiny.flat_weights(generator))
