"""The plain and the private step of JAX-Privacy; run by `dp_step.py`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax_privacy
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dp_step  # noqa: E402

SHAPES = {"mlp": (784,), "lenet": (28, 28, 1), "wide": (28, 28, 1)}


class Net:
    """A student of `dp_step.make_net`: weights are made on the first pass."""

    def __init__(self, name):
        self.name = name

    def init(self, images):
        """The weights, a list of arrays."""
        self.weights, self.key = [], jax.random.key(0)
        self.apply(None, images)
        return self.weights

    def apply(self, weights, images):
        """Logits `[batch, 10]`."""
        self.given = None if weights is None else iter(weights)
        return getattr(self, self.name)(images)

    def weight(self, *shape, scale=0.1):
        if self.given is not None:
            return next(self.given)
        self.key, key = jax.random.split(self.key)
        self.weights.append(scale * jax.random.normal(key, shape))
        return self.weights[-1]

    def dense(self, x, width):
        return x @ self.weight(x.shape[-1], width) + self.weight(width, scale=0.0)

    def convolution(self, x, width, size, stride=1, padding="VALID", bias=True):
        kernel = self.weight(size, size, x.shape[-1], width)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers
        )
        return y + self.weight(width, scale=0.0) if bias else y

    def mlp(self, x):
        x = jax.nn.relu(self.dense(x, 256))
        return self.dense(jax.nn.relu(self.dense(x, 256)), 10)

    def lenet(self, x):
        x = pool(jax.nn.relu(self.convolution(x, 16, 8, 2, "SAME")), 1)
        x = pool(jax.nn.relu(self.convolution(x, 32, 4, 2)), 1)
        x = jax.nn.relu(self.dense(x.reshape(len(x), -1), 32))
        return self.dense(x, 10)

    def wide(self, x):
        x = jax.nn.relu(self.convolution(x, 32, 3))
        x = pool(jax.nn.relu(self.convolution(x, 64, 3)), 2)
        x = jax.nn.relu(self.dense(x.reshape(len(x), -1), 128))
        return self.dense(x, 10)

    def normalized(self, x, width, stride=1, size=3):
        """A convolution and a GroupNormalization of eight groups."""
        x = self.convolution(x, width, size, stride, "SAME", bias=False)
        groups = x.reshape(*x.shape[:3], 8, width // 8)
        mean = groups.mean((1, 2, 4), keepdims=True)
        variance = groups.var((1, 2, 4), keepdims=True)
        groups = (groups - mean) * jax.lax.rsqrt(variance + 1e-3)
        scale, offset = self.weight(width), self.weight(width, scale=0.0)
        return groups.reshape(x.shape) * scale + offset

    def resnet(self, x):
        x = jax.nn.relu(self.normalized(x, 16))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            y = jax.nn.relu(self.normalized(x, width, stride))
            y = self.normalized(y, width)
            if stride > 1:
                x = self.normalized(x, width, stride, size=1)
            x = jax.nn.relu(x + y)
        return self.dense(x.mean((1, 2)), 10)


def pool(x, stride):
    window, strides = (1, 2, 2, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")


def make_batch(net, size):
    """Random images and labels."""
    images = jax.random.uniform(
        jax.random.key(1), (size, *SHAPES.get(net, (32, 32, 3)))
    )
    return images, jax.random.randint(jax.random.key(2), (size,), 0, 10)


def make_step(name, batch, private):
    """The compiled training step."""
    net, size = Net(name), len(batch[1])
    weights = net.init(batch[0])

    def loss(weights, images, labels):
        logits = net.apply(weights, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    transform = optax.sgd(0.01)
    gradient = jax.grad(loss)
    if private:
        gradient = jax_privacy.clipped_grad(
            loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=size
        )
        noise = jax_privacy.noise_addition.gaussian_privatizer(
            stddev=1.0 / size, prng_key=jax.random.key(3)
        )
        transform = optax.chain(noise, transform)

    @jax.jit
    def update(weights, state, images, labels):
        gradients = gradient(weights, images, labels)
        updates, state = transform.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    held = [weights, transform.init(weights)]

    def step(images, labels):
        held[:] = jax.block_until_ready(update(*held, images, labels))

    return step


def main(kind, path, net, batch_size, repeats):
    jax.block_until_ready(jnp.zeros(1))
    rest = dp_step.peak_mb()
    batch = make_batch(net, int(batch_size))
    step = make_step(net, batch, private=path != "plain")
    if kind == "memory":
        for _ in range(4):
            step(*batch)
        peak = dp_step.peak_mb()
        return {"peak_mb": peak, "step_mb": peak - rest}
    steps = {"plain": make_step(net, batch, private=False), "private": step}
    return dp_step.compare(steps, batch, int(repeats))


if __name__ == "__main__":
    dp_step.answer(main(*sys.argv[1:]))
