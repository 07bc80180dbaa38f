"""Which rule computes which layer; what has none is left to the vectorized path."""

from __future__ import annotations

from collections.abc import Callable

import keras

from dp_transcribe.mechanisms.clipping import einsum_rules, normalization_rules, rules
from dp_transcribe.mechanisms.clipping.recording import Rule

# Looked up by exact type, since a subclass may compute something else.
_RULES: dict[type, Rule] = {
    keras.layers.Dense: rules.dense,
    keras.layers.Conv1D: rules.conv,
    keras.layers.Conv2D: rules.conv,
    keras.layers.Conv1DTranspose: rules.conv_transpose,
    keras.layers.Conv2DTranspose: rules.conv_transpose,
    keras.layers.DepthwiseConv1D: rules.depthwise_conv,
    keras.layers.DepthwiseConv2D: rules.depthwise_conv,
    keras.layers.SeparableConv1D: rules.separable_conv,
    keras.layers.SeparableConv2D: rules.separable_conv,
    keras.layers.Embedding: rules.embedding,
    keras.layers.PReLU: rules.prelu,
    keras.layers.EinsumDense: einsum_rules.einsum_dense,
    keras.layers.GroupNormalization: normalization_rules.group_normalization,
}

# Rules that hold something of their own for each layer.
_RULE_FACTORIES: dict[type, Callable[..., Rule]] = {
    keras.layers.LayerNormalization: normalization_rules.layer_normalization,
    keras.layers.RMSNormalization: normalization_rules.rms_normalization,
    keras.layers.MultiHeadAttention: einsum_rules.Attention,
}

_CONDITIONS: dict[type, Callable[..., bool]] = {
    keras.layers.EinsumDense: einsum_rules.is_batched,
    keras.layers.MultiHeadAttention: einsum_rules.is_plain_attention,
    keras.layers.LayerNormalization: lambda layer: not layer.rms_scaling,
}


def rule_of(layer: keras.layers.Layer) -> Rule | None:
    """Returns the rule that computes `layer`, or None."""
    if not has_rule(layer):
        return None
    kind = type(layer)
    if kind in _RULE_FACTORIES:
        return _RULE_FACTORIES[kind](layer)
    return _RULES[kind]


def has_rule(layer: keras.layers.Layer) -> bool:
    """Whether a rule computes `layer`. Makes none: it is asked at every trace."""
    kind = type(layer)
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return False
    if kind in _CONDITIONS and not _CONDITIONS[kind](layer):
        return False
    return kind in _RULES or kind in _RULE_FACTORIES
