"""Cost of one differentially private student step, in plain Keras steps.

    python benchmarks/dp_step.py --output=dp_step.json
    python benchmarks/dp_step.py --nets=mlp,lenet --paths=ghost,ghost/2,vectorized
    python benchmarks/peers/make_environments.py --peers_dir=.peers
    python benchmarks/dp_step.py --peers_dir=.peers

A step is everything: forward, backward, per-example bounding, Gaussian noise and the
optimizer's update. Plain and private steps alternate in one process, and the ratio is
that of their medians. A peer runs in an environment of its own, beside its own
framework's plain step, with the number of threads that suits it best. Peak memory is
that of a process which runs nothing else. `ghost/2` computes the batch in two
micro-batches. Writes JSON and, beside it, a bar chart.
"""

import argparse
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NETS = ("mlp", "lenet", "wide", "resnet")
PEERS = {
    "opacus_hooks": ("opacus", "opacus_step.py"),
    "opacus_ghost": ("opacus", "opacus_step.py"),
    "jax_privacy": ("jax_privacy", "jax_privacy_step.py"),
}
OWN = ("ghost", "vectorized", "tf_privacy")
# A worker may have this part of the memory that is free; TF-Privacy asks for all of it.
MEMORY_SHARE = 0.8
TARGETS = {"mlp": 1.25, "lenet": 2.0, "wide": 1.5, "resnet": 1.5}

logger = logging.getLogger("dp_step")


def make_net(name):
    """Returns one of the students that the table is about."""
    import keras

    layers = keras.layers
    if name == "mlp":
        return mlp((256, 256))
    if name == "lenet":
        return keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(16, 8, strides=2, padding="same", activation="relu"),
                layers.MaxPool2D(2, 1),
                layers.Conv2D(32, 4, strides=2, activation="relu"),
                layers.MaxPool2D(2, 1),
                layers.Flatten(),
                layers.Dense(32, activation="relu"),
                layers.Dense(10),
            ]
        )
    if name == "wide":
        return keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(32, 3, activation="relu"),
                layers.Conv2D(64, 3, activation="relu"),
                layers.MaxPool2D(2),
                layers.Flatten(),
                layers.Dense(128, activation="relu"),
                layers.Dense(10),
            ]
        )
    return resnet()


def mlp(widths):
    """Returns a perceptron on 784 pixels."""
    import keras

    hidden = [keras.layers.Dense(width, activation="relu") for width in widths]
    return keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10)])


def resnet():
    """Returns a residual net with GroupNormalization on 32×32×3."""
    import keras

    layers = keras.layers

    def convolution(x, width, stride=1, size=3):
        x = layers.Conv2D(width, size, stride, "same", use_bias=False)(x)
        return layers.GroupNormalization(8)(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(inputs, 16))
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(convolution(x, width, stride))
        y = convolution(y, width)
        if stride > 1:
            x = convolution(x, width, stride, size=1)
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def make_batch(model, size):
    """Returns random images and labels, as tensors."""
    import tensorflow as tf

    images = tf.random.uniform((size, *model.input_shape[1:]))
    return images, tf.random.uniform([size], maxval=10, dtype=tf.int32)


def plain_step(model):
    """Returns the step that `model.fit` runs, without XLA."""
    import keras
    import tensorflow as tf

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.01)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    step = tf.function(lambda images, labels: model.train_step((images, labels)))
    return lambda images, labels: step(images, labels)["loss"].numpy()


def private_step(model, path, noise=True):
    """Returns the private step: normalised gradients, Gaussian noise, SGD."""
    import keras
    import tensorflow as tf

    from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
    from dp_transcribe.mechanisms.noise import NoiseSource

    source, optimizer = NoiseSource(seed=0), keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)
    clipping, _, microbatches = path.partition("/")

    @tf.function
    def step(images, labels):
        total = clipped_gradient_sum(
            model,
            images,
            labels,
            lambda y, logits: tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits),
            l2_norm=1.0,
            normalize=True,
            clipping=clipping,
            microbatches=int(microbatches or 1),
        )
        gradients, size = total.gradients, tf.cast(tf.shape(labels)[0], tf.float32)
        if noise:
            draws = source.normal_like(gradients, number=source.advance())
            gradients = [g + z for g, z in zip(gradients, draws, strict=True)]
        gradients = [g / size for g in gradients]
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )
        return tf.reduce_mean(total.losses)

    return lambda images, labels: step(images, labels).numpy()


def alternate(steps, batch, repeats):
    """Runs steps in turn and returns medians of seconds, and of processor seconds."""
    for step in steps.values():
        step(*batch)
        step(*batch)
    wall = {name: [] for name in steps}
    processor = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started, used = time.perf_counter(), time.process_time()
            step(*batch)
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    return (
        {name: statistics.median(times) for name, times in wall.items()},
        {name: statistics.median(times) for name, times in processor.items()},
    )


def measure_time(net, path, batch_size, repeats):
    """Times one path against the plain step."""
    model = make_net(net)
    batch = make_batch(model, batch_size)
    steps = {"plain": plain_step(model), "private": private_step(model, path)}
    if path == "ghost":
        steps["noiseless"] = private_step(model, path, noise=False)
    return compare(steps, batch, repeats)


def compare(steps, batch, repeats):
    """The private step in plain ones, and what both take."""
    wall, processor = alternate(steps, batch, repeats)
    result = {
        "ratio": wall["private"] / wall["plain"],
        "processor_ratio": processor["private"] / processor["plain"],
        "plain_ms": 1e3 * wall["plain"],
        "private_ms": 1e3 * wall["private"],
    }
    if "noiseless" in wall:
        result["ratio_without_noise"] = wall["noiseless"] / wall["plain"]
        result["processor_ratio_without_noise"] = (
            processor["noiseless"] / processor["plain"]
        )
    return result


def peak_mb():
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(net, path, batch_size):
    """Returns the peak of this process, and its share above a process at rest."""
    import tensorflow as tf

    tf.zeros([1]).numpy()
    rest = peak_mb()
    model = make_net(net)
    batch = make_batch(model, batch_size)
    step = plain_step(model) if path == "plain" else private_step(model, path)
    for _ in range(4):
        step(*batch)
    peak = peak_mb()
    return {"peak_mb": peak, "step_mb": peak - rest}


def in_own_process(arguments, timeout, program=(sys.executable, __file__, "--worker")):
    """Runs a worker and returns what it measured, or the error."""
    try:
        done = subprocess.run(
            [*map(str, program), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["killed"]
        return {"error": f"exit status {done.returncode}: {last[0][:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(measured):
    """What a worker prints for `in_own_process`."""
    print(json.dumps(measured))


def measure(path, common, timeout, peers_dir):
    """Time and memory of one path on one net."""
    if path in PEERS:
        return measure_peer(path, common, timeout, peers_dir)
    result = in_own_process(["time", path, *common], timeout)
    if "error" not in result:
        result |= in_own_process(["memory", path, *common], timeout)
    return result


def measure_peer(path, common, timeout, peers_dir):
    """The same for a peer, with the number of threads that suits it best."""
    name, file = PEERS[path]
    script = Path(__file__).with_name("peers") / file
    program = (peers_dir.resolve() / name / "bin" / "python", script)
    if not program[0].exists():
        return {"error": f"not in {peers_dir}: run peers/make_environments.py"}
    tries = [[]]
    if name == "opacus":
        tries = [[str(n)] for n in range(1, len(os.sched_getaffinity(0)) + 1)]
    found = [
        in_own_process(["time", path, *common, *threads], timeout, program)
        for threads in tries
    ]
    found.sort(key=lambda result: result.get("private_ms", float("inf")))
    result, threads = found[0], [str(n) for n in [found[0].get("threads")] if n]
    if "error" in result:
        return result
    memory, plain = (
        in_own_process(["memory", which, *common, *threads], timeout, program)
        for which in (path, "plain")
    )
    if "step_mb" in memory and "step_mb" in plain:
        memory["memory_ratio"] = memory["step_mb"] / plain["step_mb"]
    return result | memory


def run(nets, paths, batch_size, repeats, timeout, peers_dir):
    """Measures every path on every net."""
    results = {}
    for net in nets:
        common = [net, str(batch_size), str(repeats)]
        plain = in_own_process(["memory", "plain", *common], timeout)
        results[net] = {"plain": plain}
        for path in paths:
            result = measure(path, common, timeout, peers_dir)
            if path not in PEERS and "step_mb" in plain and "step_mb" in result:
                result["memory_ratio"] = result["step_mb"] / plain["step_mb"]
            results[net][path] = result
            logger.info("%s %s %s", net, path, json.dumps(result))
    return {"batch": batch_size, "repeats": repeats, "nets": results}


def draw(report, file):
    """Draws the ratios as bars, with the targets as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = report["nets"]
    paths = [p for p in next(iter(nets.values())) if p != "plain"]
    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    width = 0.8 / len(paths)
    for i, path in enumerate(paths):
        heights = [nets[n][path].get("ratio", 0.0) for n in nets]
        places = [j + i * width for j in range(len(nets))]
        bars = axes.bar(places, heights, width, label=path)
        labels = [f"{h:.2f}" if h else "failed" for h in heights]
        axes.bar_label(bars, labels, fontsize=8)
    for j, net in enumerate(nets):
        axes.hlines(TARGETS[net], j - width / 2, j + 0.8 - width / 2, "black", "dotted")
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(nets))], list(nets))
    axes.set_yscale("log")
    axes.set_ylabel("private step / plain step (dotted: target)")
    axes.legend()
    figure.savefig(file, dpi=120)


def net_names(text):
    """Names of nets, separated by commas."""
    return chosen(text, NETS, "|".join(NETS))


def path_names(text):
    """Names of paths, separated by commas; ours may be in micro-batches."""
    pattern = f"({'|'.join(OWN)})(/[1-9][0-9]*)?|{'|'.join(PEERS)}"
    return chosen(text, (*OWN, *PEERS), pattern)


def chosen(text, names, pattern):
    """The names in a text, which argparse refuses if one does not fit the pattern."""
    for name in text.split(","):
        if not re.fullmatch(pattern, name):
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return text.split(",")


def parse(arguments):
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("dp_step.json"))
    parser.add_argument("--nets", type=net_names, default=",".join(NETS))
    parser.add_argument(
        "--paths", type=path_names, help="by default ours, and the installed peers'"
    )
    parser.add_argument("--peers_dir", type=Path, default=Path(".peers"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--timeout", type=float, default=600.0)
    return parser.parse_args(arguments)


def default_paths(options):
    """Our own paths, and those of the peers that are installed."""
    installed = [
        path
        for path, (name, _) in PEERS.items()
        if (options.peers_dir / name / "bin" / "python").exists()
    ]
    return [*OWN, *installed]


def limit_memory():
    """Lets a path that needs too much fail, and nothing else with it."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return
    free = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (int(free * MEMORY_SHARE),) * 2)


def worker(kind, path, net, batch, repeats):
    """Measures one thing and prints it as JSON."""
    limit_memory()
    if kind == "memory":
        return measure_memory(net, path, int(batch))
    return measure_time(net, path, int(batch), int(repeats))


def main():
    if sys.argv[1:2] == ["--worker"]:
        answer(worker(*sys.argv[2:]))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(sys.argv[1:])
    paths = options.paths or default_paths(options)
    settings = options.batch, options.repeats, options.timeout, options.peers_dir
    report = run(options.nets, paths, *settings)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, options.output.with_suffix(".png"))
    for net, measured in report["nets"].items():
        for path in paths:
            ratio = measured[path].get("ratio")
            shown = f"{ratio:.2f}" if ratio else measured[path]["error"]
            print(f"{net:8s} {path:12s} {shown}  (target {TARGETS[net]})")


if __name__ == "__main__":
    main()
