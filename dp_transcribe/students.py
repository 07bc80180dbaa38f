"""Students: small classifiers that per-example gradients are cheap for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from dp_transcribe._validate import instance_of, invalid, one_of, positive_int
from dp_transcribe.mechanisms.clipping.validate import every_layer

# Fewer numbers may be equal by chance, or by the same initial values.
_FEWEST = 16


def lenet_student(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    filters: tuple[int, int] = (16, 32),
    units: int = 32,
    activation: str = "tanh",
) -> keras.Model:
    """The small network of private training: two strided convolutions, two dense.

    Bounded activations keep clipped gradients informative, hence tanh. 26,010 weights
    for 28 x 28 x 1 images and 10 classes.

    Args:
        input_shape: `(height, width, channels)`.
        num_classes: Number of logits.
        filters: Channels of the two convolutions.
        units: Width of the hidden dense layer.
        activation: Of all hidden layers.

    Returns:
        A model `[batch, h, w, c] -> logits [batch, num_classes]`.

    References:
        Papernot et al. 2021, "Tempered Sigmoid Activations for Deep Learning with
        Differential Privacy", arXiv:2007.14191.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input(tuple(input_shape)),
            layers.Conv2D(filters[0], 8, 2, "same", activation=activation),
            layers.MaxPooling2D(2, 1),
            layers.Conv2D(filters[1], 4, 2, activation=activation),
            layers.MaxPooling2D(2, 1),
            layers.Flatten(),
            layers.Dense(units, activation=activation),
            layers.Dense(positive_int("num_classes", num_classes), name="logits"),
        ],
        name="student",
    )


def mlp_student(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    units: Sequence[int] = (256, 256),
    activation: str = "relu",
) -> keras.Model:
    """A fully connected student.

    Args:
        input_shape: Shape of one input; flattened.
        num_classes: Number of logits.
        units: Widths of the hidden layers.
        activation: Of all hidden layers.

    Returns:
        A model `[batch, *input_shape] -> logits [batch, num_classes]`.
    """
    layers = keras.layers
    model = keras.Sequential([layers.Input(tuple(input_shape))], name="student")
    model.add(layers.Flatten())
    for width in units:
        model.add(layers.Dense(width, activation=activation))
    model.add(layers.Dense(positive_int("num_classes", num_classes), name="logits"))
    return model


def conv_student(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    filters: Sequence[int] = (32, 64, 128),
    units: int | None = 128,
    groups: int | None = 8,
    activation: str = "relu",
    pooling: str = "max",
) -> keras.Model:
    """A wider student: blocks of convolution, normalisation, activation, pooling.

    Args:
        input_shape: `(height, width, channels)`.
        num_classes: Number of logits.
        filters: Channels of each block; multiples of `groups`.
        units: Width of the hidden dense layer, or `None` for no such layer.
        groups: Groups of the group normalisation, -1 for every channel by itself,
            or `None` for none at all.
        activation: Of all hidden layers.
        pooling: `"max"` or `"average"`, over 2 x 2 pixels.

    Returns:
        A model `[batch, h, w, c] -> logits [batch, num_classes]`.
    """
    layers = keras.layers
    one_of("pooling", pooling, ("max", "average"))
    pool = layers.MaxPooling2D if pooling == "max" else layers.AveragePooling2D
    model = keras.Sequential([layers.Input(tuple(input_shape))], name="student")
    for width in filters:
        model.add(layers.Conv2D(width, 3, padding="same", use_bias=groups is None))
        if groups is not None:
            model.add(layers.GroupNormalization(groups))
        model.add(layers.Activation(activation))
        model.add(pool(2))
    model.add(layers.Flatten())
    if units is not None:
        model.add(layers.Dense(units, activation=activation))
    model.add(layers.Dense(positive_int("num_classes", num_classes), name="logits"))
    return model


def replace_batch_norm(model: keras.Model, groups: int = 8) -> keras.Model:
    """A copy of a model with group normalisation in place of batch normalisation.

    Batch normalisation mixes the examples of a batch, so no example's contribution
    to a gradient is bounded, and its moving statistics leave the mechanism unnoised.

    Args:
        model: A Functional or Sequential model, nested ones included.
        groups: Most groups in a layer; fewer where they would not divide its channels.

    Returns:
        A new model. All other layers have copies of the old weights; scale and offset
        of the new layers start at 1 and 0, so it must be trained again.

    **Privacy**: weights are copied as they are. A student made of the teacher's own
    model starts with the teacher's private weights, and a transcriber refuses it;
    make it of an untrained one, for example `keras.models.clone_model(model)`.
    """
    instance_of("model", model, keras.Model)
    groups = positive_int("groups", groups)
    copy = _clone(model, groups)
    _copy_weights(model, copy)
    return copy


def split_frozen(student: keras.Model) -> tuple[keras.Model, keras.Model] | None:
    """The frozen first layers of a student, and the part that learns.

    Args:
        student: a Functional or Sequential model.

    Returns:
        Two models that share the student's layers and follow one another, or None if
        nothing is frozen, if what is frozen is not all in front, or if it is random.
    """
    learning = [layer for layer in student.layers if layer.trainable_variables]
    try:
        front = keras.Model(student.inputs[0], learning[0].input)
        head = keras.Model(learning[0].input, student.outputs[0])
    except (AttributeError, IndexError, TypeError, ValueError):
        return None  # no single tensor stands between the two
    of_head = {id(variable) for variable in head.trainable_variables}
    complete = all(id(v) in of_head for v in student.trainable_variables)
    random = any("seed_generator" in variable.path for variable in front.variables)
    if not front.weights or front.trainable_variables or random or not complete:
        return None
    return front, head


def last_features(model: keras.Model) -> keras.Model:
    """What the last layer that has weights reads, and the logits, as one model.

    Args:
        model: a Functional or Sequential model.

    Returns:
        A model that shares the layers: `[features, logits]` of a batch of inputs.

    Raises:
        ValueError: that layer reads no single tensor of this model.
    """
    try:
        last = next(layer for layer in reversed(model.layers) if layer.weights)
        if isinstance(last, keras.Model):
            raise TypeError("The features are inside another model.")
        return keras.Model(model.inputs, [last.input, model.outputs[0]])
    except (AttributeError, StopIteration, TypeError, ValueError) as error:
        expected = "a Functional or Sequential model that ends in a layer with weights"
        mend = "Set the weight of `activation` to 0."
        raise invalid("model", model, expected, mend) from error


def _clone(model: keras.Model, groups: int) -> keras.Model:
    """A copy of `model` with new weights and no batch normalisation."""

    def replace(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.Model):
            return _clone(layer, groups)
        if isinstance(layer, keras.layers.BatchNormalization):
            return _group_norm(layer, groups)
        return type(layer).from_config(layer.get_config())

    if isinstance(model, keras.Sequential):
        return keras.models.clone_model(model, clone_function=replace)
    return keras.models.clone_model(
        model, clone_function=replace, call_function=_call_layer
    )


def _call_layer(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
    """Calls a copied layer; group normalisation takes the input and nothing else."""
    if isinstance(layer, keras.layers.GroupNormalization):
        return layer(args[0])
    return layer(*args, **kwargs)


def _group_norm(
    layer: keras.layers.BatchNormalization, groups: int
) -> keras.layers.GroupNormalization:
    """Group normalisation in place of `layer`, in the most groups that divide it."""
    channels = int(layer.moving_mean.shape[0])
    return keras.layers.GroupNormalization(
        next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0),
        axis=layer.axis,
        epsilon=layer.epsilon,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
        dtype=layer.dtype_policy,
    )


def _leaves(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of a model and of the models inside it, in order."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def _copy_weights(source: keras.Model, target: keras.Model) -> None:
    for old, new in zip(_leaves(source), _leaves(target), strict=True):
        if type(old) is type(new):
            new.set_weights(old.get_weights())


def batch_norm_layers(model: keras.Model) -> list[str]:
    """Names of the layers that normalise over the batch, wherever they are nested."""
    layers = model._flatten_layers(include_self=False, recursive=True)
    return [
        layer.name
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def check_student(student: keras.Model, teacher: Any) -> None:
    """Checks that a student can learn privately from a teacher.

    Args:
        student: A built Keras model ending in logits `[batch, classes]`.
        teacher: A `Teacher`: its `num_classes`, `input_shape` and `model` are read.

    Raises:
        ValueError: if the student has batch normalisation, a float16 policy, another
            input shape or number of classes than the teacher, or weights of the
            teacher's, shared or copied.

    **Privacy**: batch normalisation, float16 and weights of the teacher's would each
    break the guarantee; all are refused before anything is spent. Copies are known by
    equal values: weights that were scaled, cut or trained on are not.
    """
    instance_of("student", student, keras.Model)
    _check_shapes(student, teacher)
    found = batch_norm_layers(student)
    if found:
        mend = "Use `replace_batch_norm(student)`, which has group normalisation."
        expected = "a student without BatchNormalization, which mixes examples"
        raise invalid("student", found, expected, mend)
    _check_dtypes(student)
    _check_own_weights(student, teacher)


def _check_shapes(student: keras.Model, teacher: Any) -> None:
    if not student.built or not hasattr(student, "input_shape"):
        expected = "a built Functional or Sequential model"
        raise invalid("student", student, expected, "Start it with `keras.Input`.")
    inputs, outputs = student.input_shape, student.output_shape
    alone = isinstance(inputs, tuple) and not keras.tree.is_nested(
        student.compute_output_spec(keras.KerasTensor(inputs))
    )
    if not alone:
        expected = "a student from one tensor to one tensor, neither in a dict or list"
        raise invalid("student", f"{inputs} -> {outputs}", expected)
    if tuple(inputs[1:]) != tuple(teacher.input_shape):
        expected = f"a student of the teacher's input shape {teacher.input_shape}"
        raise invalid("student", f"input shape {inputs}", expected)
    if tuple(outputs[1:]) != (teacher.num_classes,):
        expected = f"a student ending in {teacher.num_classes} logits, as the teacher"
        raise invalid("student", f"output shape {outputs}", expected)
    check_ends_in_logits("student", student)


def check_ends_in_logits(name: str, model: keras.Model) -> None:
    """Refuses a model whose last layer or operation normalises its outputs.

    Args:
        name: of the argument.
        model: a built Keras model.

    Raises:
        ValueError: the model ends in a softmax or a sigmoid.
    """
    last: Any = model
    while isinstance(last, keras.Model) and last.layers:
        last = getattr(last, "operations", last.layers)[-1]
    activation = getattr(last, "activation", None)
    normalizes = activation in (keras.activations.softmax, keras.activations.sigmoid)
    if normalizes or type(last).__name__ in ("Softmax", "Sigmoid"):
        mend = "Leave out the softmax or sigmoid after its last dense layer."
        raise invalid(name, last.name, f"a {name} ending in logits", mend)


def check_not_adapted(name: str, model: keras.Model) -> None:
    """Refuses a model with statistics of data that no privacy accounting knows of.

    Args:
        name: of the argument.
        model: a built Keras model.

    Raises:
        ValueError: a layer of it has no constants, so that `adapt` fits it to data.
    """
    adapted = [layer.name for layer in every_layer(model) if _is_adapted(layer)]
    if adapted:
        mend = "State public constants instead, as `Normalization(mean=, variance=)`."
        expected = (
            "no layers with statistics of `adapt`, which would carry private records "
            "past all noise"
        )
        raise invalid(name, adapted, expected, mend)


def _is_adapted(layer: keras.layers.Layer) -> bool:
    """Whether a layer has no constants, so that `adapt` fits it to data."""
    if isinstance(layer, keras.layers.Normalization):
        return layer.input_mean is None
    if isinstance(layer, keras.layers.Discretization):
        return layer.num_bins is not None
    # TextVectorization, StringLookup, IntegerLookup and what derives from them.
    return not getattr(layer, "_has_input_vocabulary", True)


def _check_dtypes(student: keras.Model) -> None:
    """Refuses float16: its gradients under- and overflow before they are clipped."""
    for layer in every_layer(student):
        policy = layer.dtype_policy
        if "float16" in (policy.compute_dtype, policy.variable_dtype):
            mend = "Use 'float32' or 'mixed_bfloat16'."
            expected = f"no float16 policy (layer '{layer.name}')"
            raise invalid("student", policy.name, expected, mend)


def _check_own_weights(student: keras.Model, teacher: Any) -> None:
    known = teacher.read_variables() if hasattr(teacher, "read_variables") else []
    private = {id(variable) for variable in known}
    shared = [
        v.path for v in student.variables if id(v) in private or id(v.value) in private
    ]
    if shared:
        mend = "Clone the layers; their private values would be released as they are."
        expected = "a student that shares no weights with the teacher"
        raise invalid("student", shared, expected, mend)
    weights = _weights_by_shape(teacher)
    copied = [v.path for v in student.variables if _is_copy(v, weights)]
    if copied:
        mend = "Start it anew: private values would be released as they are."
        expected = "a student whose weights are not the teacher's"
        raise invalid("student", copied, expected, mend)


_Weights = dict[tuple[int, ...], list[tuple[np.ndarray, bool]]]


def _weights_by_shape(teacher: Any) -> _Weights:
    """Values of a teacher's variables, or of all of those of an ensemble's members.

    With each goes whether it may be public, such as fixed filters: it is frozen, and
    others beside it are not.
    """
    member = getattr(teacher, "member", None)
    if member is not None:
        learnt = member.trainable_variables
        # One array for each variable, whose first axis is that of the teachers.
        count = len(learnt) + len(member.non_trainable_variables)
        values: Any = teacher.get_weights()[:count]
    else:
        known = teacher.read_variables() if hasattr(teacher, "read_variables") else []
        learnt = [v for v in known if v.trainable]
        frozen = [v for v in known if not v.trainable]
        values = [[keras.ops.convert_to_numpy(v)] for v in [*learnt, *frozen]]
    found: _Weights = {}
    for number, arrays in enumerate(values):
        may_be_public = 0 < len(learnt) <= number
        for array in arrays:
            found.setdefault(array.shape, []).append((array, may_be_public))
    return found


def _is_copy(variable: Any, weights: _Weights) -> bool:
    """Whether a student's variable holds the same numbers as one of the teacher's."""
    candidates = weights.get(tuple(variable.shape), [])
    value = keras.ops.convert_to_numpy(variable) if candidates else np.zeros(0)
    if value.size < _FEWEST or np.all(value == value.flat[0]):
        return False
    return any(
        np.array_equal(value, array.astype(value.dtype))
        for array, may_be_public in candidates
        if variable.trainable or not may_be_public
    )
