"""What Keras would find wrong after an epoch is found before anything is spent."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms import NormalizedGradient
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber import rehearsal
from tests import tiny
from tests.tiny import fit

IMAGES = np.random.default_rng(0).random((8, *tiny.IMAGE), np.float32)
LABELS = np.arange(8) % tiny.CLASSES
ONE_HOT = np.eye(tiny.CLASSES, dtype=np.float32)[LABELS]
CROSS_ENTROPY = keras.losses.CategoricalCrossentropy(from_logits=True)


def model_of(**arguments):
    return tiny.transcriber(
        NormalizedGradient(), compile_arguments={"metrics": ["accuracy"], **arguments}
    )


def assert_refused(message, model=None, **arguments):
    """It costs nothing, not even the choice of a target and its noise."""
    model = model or model_of()
    weights = tiny.flat_weights(model.student)
    with pytest.raises(ValueError, match=message):
        fit(model, target_epsilon=8.0, **arguments)
    assert len(model.ledger) == 0
    assert int(model.noise.counter.numpy()) == 0
    assert not model.mechanism.is_calibrated
    assert np.array_equal(tiny.flat_weights(model.student), weights)


def dataset(images, labels):
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)


class Batches(keras.utils.PyDataset):
    """Two batches of four."""

    def __init__(self, images, labels):
        super().__init__()
        self.images, self.labels = images, labels

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return self.images[rows], self.labels[rows]


@pytest.mark.parametrize(
    "data",
    [
        (IMAGES[:, :7], LABELS),
        (IMAGES[..., 0], LABELS),
        (IMAGES, LABELS[:7]),
        (IMAGES,),
        (IMAGES, None),
        IMAGES,
        (IMAGES * np.nan, LABELS),
        (IMAGES.astype(str), LABELS),
        (IMAGES[:0], LABELS[:0]),
        (IMAGES, LABELS + 5),
        (IMAGES, LABELS - 1),
        (IMAGES, LABELS[:, None] + 5),
        (IMAGES, LABELS + 0.5),
        (IMAGES, np.full(8, np.nan)),
        (IMAGES, np.stack([LABELS, LABELS], 1)),
        (IMAGES, LABELS, np.ones(7)),
        (IMAGES, LABELS, np.ones((8, 2))),
        {"image": IMAGES, "label": LABELS},
        "mnist",
        iter([(IMAGES, LABELS)]),
        dataset(IMAGES[:, :7], LABELS),
        dataset(IMAGES[:0], LABELS[:0]),
        dataset(IMAGES, LABELS + 5),
        dataset(IMAGES, LABELS).repeat(),
        dataset(IMAGES, LABELS).unbatch(),
        dataset(IMAGES, LABELS).map(lambda x, y: {"image": x, "label": y}),
        dataset(IMAGES, LABELS).map(lambda x, y: x),
        dataset(IMAGES, LABELS).filter(lambda x, y: False),
        Batches(IMAGES[:, :7], LABELS),
        Batches(IMAGES, LABELS + 5),
    ],
)
def test_validation_data_that_cannot_be_measured_cost_nothing(data):
    assert_refused("`validation_data`", validation_data=data)


@pytest.mark.parametrize("form", [lambda *data: data, dataset, Batches])
@pytest.mark.parametrize(
    ("images", "found"),
    [
        (255 * IMAGES, "to 25"),
        ((255 * IMAGES).astype(np.uint8), "to 25"),
        (2 * IMAGES - 1, "from -"),
    ],
)
def test_validation_images_of_other_pixels_than_the_teacher_takes_cost_nothing(
    form, images, found
):
    message = f"`validation_data`.*pixels from 0 to 1.*{found}.*Scale them"
    assert_refused(message, validation_data=form(images, LABELS))


def test_validation_images_are_in_the_teachers_own_range():
    teacher = Teacher(tiny.linear_model(5), outputs="logits", input_range=(-1.0, 1.0))
    model = tiny.transcriber(
        NormalizedGradient(),
        teacher=teacher,
        generator=tiny.UniformPixels(tiny.IMAGE, output_range=(-1.0, 1.0)),
    )
    assert_refused("from -1 to 1", model, validation_data=(3 * IMAGES - 1, LABELS))
    rounded = np.nextafter(2 * IMAGES - 1, np.float32(2))
    fit(model, target_epsilon=8.0, validation_data=(rounded, LABELS))


@pytest.mark.parametrize("form", [lambda *data: data, dataset, Batches])
def test_labels_must_be_of_the_form_that_the_loss_takes(form):
    message = "`validation_data`.*whole numbers.*CategoricalCrossentropy"
    assert_refused(message, validation_data=form(IMAGES, ONE_HOT))
    one_hot = model_of(loss=CROSS_ENTROPY)
    assert_refused(message, one_hot, validation_data=form(IMAGES, LABELS))


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        ((IMAGES, LABELS), None),
        ((IMAGES, LABELS, np.ones(8)), None),
        ((tf.constant(IMAGES), tf.constant(LABELS)), None),
        ((IMAGES, LABELS[:, None]), None),
        ((IMAGES, LABELS.astype(np.float32)), None),
        (dataset(IMAGES, LABELS), None),
        (Batches(IMAGES, LABELS), None),
        ((IMAGES, ONE_HOT), CROSS_ENTROPY),
        (dataset(IMAGES, ONE_HOT), CROSS_ENTROPY),
    ],
)
def test_validation_data_may_have_any_usual_form(data, loss):
    model = model_of(loss=loss)
    history = fit(model, target_epsilon=8.0, validation_data=data).history
    shown = history["val_loss"][0], history["val_accuracy"][0]
    x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
    measured = model.evaluate(x, y, sample_weight=weights, verbose=0)
    assert shown == pytest.approx(measured)


def test_measures_go_by_the_labels_that_the_loss_takes_without_validation_too():
    model = model_of(loss=CROSS_ENTROPY)
    fit(model, target_epsilon=8.0)
    predicted = np.argmax(model.predict(IMAGES, verbose=0), -1)
    _, accuracy = model.evaluate(IMAGES, ONE_HOT, verbose=0)
    assert accuracy == pytest.approx(np.mean(predicted == LABELS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("validation_freq", value) for value in (0, -1, 1.5, "1", None, [0])),
        *(("validation_steps", value) for value in (0, -1, "1")),
        *(("validation_batch_size", value) for value in (0, -1, "1")),
    ],
)
def test_counts_of_validation_are_checked(name, value):
    data = {"validation_data": (IMAGES, LABELS)}
    assert_refused(f"`{name}`", **data, **{name: value})


def test_epochs_to_validate_after_may_be_a_list_or_a_number_of_numpy():
    for frequency, count in ((np.int64(2), 1), ([1, 3], 2), (range(2, 4), 2)):
        history = fit(
            tiny.transcriber(),
            epochs=3,
            validation_data=(IMAGES, LABELS),
            validation_freq=frequency,
        )
        assert len(history.history["val_loss"]) == count


def test_what_is_validated_are_the_weights_as_they_stand_until_fit_ends():
    def run(*callbacks):
        average = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
        model = tiny.transcriber(optimizer=average)
        data = (IMAGES, LABELS)
        history = fit(model, 3, validation_data=data, callbacks=[*callbacks])
        return history.history["val_loss"][-1], model.evaluate(*data, verbose=0)

    raw, averaged = run()
    assert raw != pytest.approx(averaged)
    assert run(keras.callbacks.SwapEMAWeights()) == pytest.approx((averaged, averaged))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: keras.callbacks.EarlyStopping("val_nope"), "`monitor`.*val_accuracy"),
        (
            lambda: keras.callbacks.EarlyStopping("val_f1", mode="max"),
            "`monitor`.*val_accuracy",
        ),
        (lambda: keras.callbacks.EarlyStopping("agreement"), "`mode`.*'min' or 'max'"),
        (lambda: keras.callbacks.ReduceLROnPlateau("loss"), "`monitor`"),
        (lambda: keras.callbacks.SwapEMAWeights(), "`use_ema=True`"),
        (lambda: keras.callbacks.EarlyStopping, "`callbacks`.*not its class"),
        (lambda: 3, "`callbacks`"),
        (
            lambda: keras.callbacks.CallbackList([keras.callbacks.EarlyStopping("a")]),
            "`monitor`",
        ),
    ],
)
def test_callbacks_that_would_fail_after_an_epoch_cost_nothing(callback, message):
    data = (IMAGES, LABELS)
    assert_refused(message, validation_data=data, callbacks=callback())


def test_val_loss_is_watched_only_where_there_is_validation():
    stop = keras.callbacks.EarlyStopping(patience=3)
    assert_refused("`monitor`.*`validation_data`", callbacks=[stop])
    model = model_of()
    fit(model, target_epsilon=8.0, callbacks=[stop], validation_data=(IMAGES, LABELS))
    watched = keras.callbacks.EarlyStopping("agreement", mode="max")
    fit(model, target_epsilon=8.0, callbacks=watched)


def test_what_another_callback_reports_may_be_watched():
    class Reports(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["test_accuracy"] = 0.5

    stop = keras.callbacks.EarlyStopping("test_accuracy", mode="max", patience=0)
    history = fit(tiny.transcriber(), epochs=4, callbacks=[Reports(), stop])
    assert len(history.epoch) < 4


def test_a_scheduled_learning_rate_is_reduced_by_nothing_else():
    schedule = keras.optimizers.schedules.CosineDecay(1.0, 9)
    optimizer = keras.optimizers.SGD(schedule)
    model = tiny.transcriber(NormalizedGradient(), optimizer=optimizer)
    reduce = keras.callbacks.ReduceLROnPlateau("agreement", mode="max")
    assert_refused("`callbacks`.*learning rate", model, callbacks=[reduce])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("kept.h5", "ends in .keras"),
        ("folder.keras", "`filepath`.*writable file"),
        ("file/kept.keras", "writable folder"),
        ("kept-{nope}.keras", "`filepath`.*in braces are among"),
        ("kept-{val_loss:.2f}.keras", "`filepath`.*in braces are among"),
    ],
)
def test_checkpoints_that_could_not_be_written_cost_nothing(path, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.keras").mkdir()
    keep = keras.callbacks.ModelCheckpoint(tmp_path / path)
    assert_refused(message, callbacks=[keep])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.keras"]


def test_a_backup_that_could_not_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").touch()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "file" / "backup"))
    assert_refused("`backup_dir`.*writable folder", callbacks=[backup])


@pytest.mark.parametrize(
    ("path", "message"),
    [("file/log.csv", "writable folder"), ("folder", "writable file")],
)
def test_a_table_that_could_not_be_written_costs_nothing(path, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    log = keras.callbacks.CSVLogger(tmp_path / path)
    assert_refused(f"`filename`.*{message}", callbacks=[log])


def test_a_table_that_is_continued_is_left_as_it_was(tmp_path):
    path = tmp_path / "new" / "log.csv"
    for lines in (2, 3):  # a header and one more epoch each time
        log = keras.callbacks.CSVLogger(path, append=True)
        fit(tiny.transcriber(), callbacks=[log])
        assert len(path.read_text().splitlines()) == lines


@pytest.mark.parametrize("path", ["train", "validation", "train/logs"])
def test_logs_that_could_not_be_written_cost_nothing(path, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_is_installed", lambda _: True)
    (tmp_path / path.partition("/")[0]).touch()
    folder = tmp_path / "train" / "logs" if "/" in path else tmp_path
    board = keras.callbacks.TensorBoard(folder)
    data = (IMAGES, LABELS)
    assert_refused("`log_dir`.*writable folder", callbacks=board, validation_data=data)


def test_tensorboard_without_its_package_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_is_installed", lambda _: False)
    board = keras.callbacks.TensorBoard(tmp_path / "logs")
    assert_refused("`callbacks`.*pip install tensorboard", callbacks=[board])
    assert not any(tmp_path.iterdir())


def test_logs_of_tensorboard_are_written_where_there_was_no_folder(tmp_path):
    pytest.importorskip("tensorboard")
    board = keras.callbacks.TensorBoard(tmp_path / "logs")
    fit(tiny.transcriber(), callbacks=[board])
    assert [found.name for found in (tmp_path / "logs").iterdir()] == ["train"]


def test_a_teacher_that_cannot_be_saved_is_noticed_before_the_first_epoch(tmp_path):
    def forward(images):
        return tf.reshape(images, (-1, tiny.PIXELS))[:, : tiny.CLASSES]

    teacher = Teacher(forward, input_shape=tiny.IMAGE, outputs="logits")
    model = tiny.transcriber(NormalizedGradient(), teacher=teacher)
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "kept.keras")
    assert_refused("`teacher`.*`save_weights`", model, callbacks=[whole])
    path = tmp_path / "deep" / "{epoch}.weights.h5"
    weights = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    fit(model, target_epsilon=8.0, callbacks=[weights])
    assert (tmp_path / "deep" / "1.weights.h5").is_file()
