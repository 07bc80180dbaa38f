"""Small students, one for each layer kind and each way of putting layers together."""

import keras

L = keras.layers


def sequence(shape, *layers, dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def image(*layers, size=8, channels=3):
    return sequence((size, size - 1, channels), *layers)


def attention(call=None, **arguments):
    inputs = keras.Input((5, 6))
    values = L.Dense(7)(inputs)
    layer = L.MultiHeadAttention(2, 3, **arguments)
    return keras.Model(inputs, layer(inputs, values, **(call or {})))


def masked_attention():
    inputs = keras.Input((5, 6))
    mask = keras.ops.cumsum(keras.ops.abs(inputs[:, :, :5]), axis=2) > 1.0
    outputs, scores = L.MultiHeadAttention(2, 3)(
        inputs, inputs, attention_mask=mask, return_attention_scores=True
    )
    return keras.Model(
        inputs, L.Concatenate()([L.Flatten()(outputs), L.Flatten()(scores)])
    )


def reused():
    """Convolution, dense on vectors and dense on positions, each used twice."""
    inputs = keras.Input((4, 4, 3))
    conv = L.Conv2D(3, 3, padding="same", activation="tanh")
    point, head = L.Dense(5), L.Dense(6)
    x = conv(conv(inputs))
    flat = L.Flatten()(x)
    outputs = [
        head(L.Dense(4)(flat)),
        head(L.Dense(4, activation="relu")(flat)),
        L.Flatten()(point(point(L.Dense(5)(x)))),
    ]
    return keras.Model(inputs, L.Concatenate()(outputs))


def nested():
    """Sequential and Functional models inside, one of them used twice, and raw ops."""
    first = sequence((6,), L.Dense(4, activation="tanh"), L.LayerNormalization())
    inner = keras.Input((4,))
    second = keras.Model(inner, L.Dense(3)(inner) + keras.ops.sin(inner[:, :3]))
    inputs = keras.Input((6,))
    return keras.Model(inputs, second(first(inputs)) + second(first(inputs * 2.0)))


def residual():
    inputs = keras.Input((6, 6, 4))
    x = L.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = L.Activation("relu")(L.GroupNormalization(2)(x))
    x = L.Add()([inputs, x])
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


def partly_frozen():
    frozen = L.Dense(5, trainable=False)
    normalization = L.BatchNormalization(trainable=False)
    return sequence((6,), L.Dense(5), frozen, normalization, L.ReLU(), L.Dense(3))


def shared_embedding():
    """A table used at two places, with repeated rows."""
    inputs = keras.Input((6,), dtype="int32")
    table = L.Embedding(4, 5)
    return keras.Model(inputs, L.Dense(3)(table(inputs) + table(inputs[:, ::-1])))


def lenet():
    return sequence(
        (28, 28, 1),
        L.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
        L.MaxPool2D(2, 1),
        L.Conv2D(32, 4, strides=2, activation="relu"),
        L.MaxPool2D(2, 1),
        L.Flatten(),
        L.Dense(32, activation="relu"),
        L.Dense(10),
    )


# Every kind of convolution: the arrangement differs with size, stride and dilation.
CONVOLUTIONS = {
    "same": lambda: image(L.Conv2D(4, 3, padding="same")),
    "wide": lambda: image(L.Conv2D(8, 3, activation="tanh"), channels=1),
    "oblong": lambda: image(L.Conv2D(4, (3, 2), padding="same")),
    "dilated": lambda: image(L.Conv2D(4, 3, padding="same", dilation_rate=2), size=9),
    "dilated valid": lambda: image(L.Conv2D(16, 2, dilation_rate=(2, 3)), channels=8),
    "folded": lambda: image(L.Conv2D(4, 4, strides=2, padding="same")),
    "folded valid": lambda: image(L.Conv2D(4, (4, 2), strides=2), channels=2),
    "odd stride": lambda: image(L.Conv2D(4, 3, strides=2, padding="same")),
    "two strides": lambda: image(L.Conv2D(4, 3, strides=(2, 1), padding="same")),
    "long stride": lambda: image(L.Conv2D(2, 5, strides=4), size=11),
    "skipping": lambda: image(L.Conv2D(3, 1, strides=2)),
    "many channels": lambda: image(L.Conv2D(24, 3, strides=3), channels=16),
    "one position": lambda: image(L.Conv2D(6, (8, 7))),
    "groups": lambda: image(L.Conv2D(6, 3, groups=2, padding="same"), channels=4),
    "channels first": lambda: sequence(
        (3, 8, 7), L.Conv2D(4, 3, data_format="channels_first")
    ),
    "unknown size": lambda: sequence(
        (None, None, 3),
        L.Conv2D(4, 3, strides=2, padding="same"),
        L.GlobalAveragePooling2D(),
    ),
    "one dimension": lambda: sequence(
        (9, 3),
        L.Conv1D(4, 3, strides=2, padding="same", activation="relu"),
        L.Conv1D(4, 3, padding="causal", dilation_rate=2),
        L.Conv1D(4, 2, groups=2),
    ),
}

OTHER_LAYERS = {
    "dense": lambda: sequence((6,), L.Dense(5, activation="relu"), L.Dense(3)),
    "dense on positions": lambda: sequence(
        (4, 5, 6), L.Dense(7, activation="gelu"), L.Dense(2, use_bias=False)
    ),
    "depthwise": lambda: image(
        L.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
        L.DepthwiseConv2D(2, dilation_rate=2, activation="tanh"),
    ),
    "depthwise 1-D": lambda: sequence((8, 3), L.DepthwiseConv1D(3, depth_multiplier=2)),
    "separable": lambda: image(
        L.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2),
        L.SeparableConv2D(2, 2, activation="tanh"),
    ),
    "separable 1-D": lambda: sequence((8, 3), L.SeparableConv1D(4, 3)),
    "transposed": lambda: image(
        L.Conv2DTranspose(4, 3, strides=2, padding="same", activation="tanh"),
        L.Conv2DTranspose(2, 3, strides=3, output_padding=1),
        L.Conv2DTranspose(2, 3, dilation_rate=2),
        size=4,
    ),
    "transposed 1-D": lambda: sequence((5, 3), L.Conv1DTranspose(4, 3, strides=2)),
    "embedding": lambda: sequence((6,), L.Embedding(4, 5), L.Dense(3), dtype="int32"),
    "embedding of a grid": lambda: sequence((2, 3), L.Embedding(4, 5), dtype="int32"),
    "shared embedding": shared_embedding,
    "einsum": lambda: sequence(
        (4, 5),
        L.EinsumDense("abc,cd->abd", (4, 6), bias_axes="d", activation="relu"),
        L.EinsumDense("...x,xy->...y", 3, bias_axes="y"),
        L.EinsumDense("abc,dcb->abd", (4, 2), bias_axes="bd"),
    ),
    "einsum by position": lambda: sequence(
        (4, 5), L.EinsumDense("abc,bcd->acd", (5, 2), bias_axes="cd")
    ),
    "einsum of one size": lambda: sequence(
        (4, 4),
        L.EinsumDense("abc,cd->abd", (4, 4), bias_axes="b"),
        L.EinsumDense("abc,cd->adb", (4, 4), bias_axes="d"),
        L.Reshape((4, 4, 1)),
        L.EinsumDense("abcd,de->abce", (4, 4, 3), bias_axes="c"),
    ),
    "attention": attention,
    "causal attention": lambda: attention(
        {"use_causal_mask": True}, value_dim=4, use_bias=False, output_shape=5
    ),
    "masked attention": masked_attention,
    "group normalization": lambda: image(
        L.Conv2D(6, 1), L.GroupNormalization(3), L.GroupNormalization(2, center=False)
    ),
    "group normalization on axis 1": lambda: sequence(
        (6, 5), L.GroupNormalization(3, axis=1), L.GroupNormalization(1, scale=False)
    ),
    "layer normalization": lambda: sequence(
        (4, 6),
        L.LayerNormalization(),
        L.Dense(3),
        L.LayerNormalization(axis=(1, 2), scale=False),
    ),
    "rms normalization": lambda: sequence((4, 6), L.RMSNormalization(), L.Dense(3)),
    "prelu": lambda: sequence((4, 5, 6), L.PReLU(shared_axes=(1,)), L.PReLU()),
    "reused": reused,
    "nested": nested,
    "residual": residual,
    "partly frozen": partly_frozen,
    "lenet": lenet,
}

STUDENTS = {**CONVOLUTIONS, **OTHER_LAYERS}
