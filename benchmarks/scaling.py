"""How the private step scales: with the batch, with the student, over devices.

    python benchmarks/scaling.py --output=scaling.json
    python benchmarks/scaling.py --parts=batch --net=mlp --paths=ghost,tf_privacy

Cost per example should fall to a constant as the batch grows; TF-Privacy's grows.
Processor time stands beside wall time: other programs disturb it less.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dp_step  # noqa: E402

logger = logging.getLogger("scaling")

PARTS = ("batch", "weights", "devices")
BATCHES = (16, 64, 256, 1024, 4096)
WIDTHS = (32, 128, 512, 2048)


def cost(model, path, batch_size, repeats):
    """Speed of plain and private steps, in turn."""
    batch = dp_step.make_batch(model, batch_size)
    steps = {
        "plain": dp_step.plain_step(model),
        "private": dp_step.private_step(model, path),
    }
    wall, processor = dp_step.alternate(steps, batch, repeats)
    found = {f"{name}_examples_per_s": batch_size / wall[name] for name in steps}
    for name in steps:
        found[f"{name}_processor_us_per_example"] = 1e6 * processor[name] / batch_size
    return found


def by_batch(net, paths, batches, repeats):
    """Cost against the size of the batch."""
    found = {path: {} for path in paths}
    for path in paths:
        for size in batches:
            found[path][size] = cost(dp_step.make_net(net), path, size, repeats)
            logger.info("%s batch %5d %s", path, size, found[path][size])
    return found


def by_width(paths, repeats):
    """Cost against the number of weights, for perceptrons."""
    found = {path: {} for path in paths}
    for path in paths:
        for width in WIDTHS:
            model = dp_step.mlp((width, width))
            count = model.count_params()
            found[path][count] = cost(model, path, 256, repeats)
            logger.info("%s weights %8d %s", path, count, found[path][count])
    return found


def by_devices(net, repeats):
    """Examples per second over one and two logical devices, 128 examples on each."""
    import tensorflow as tf

    from dp_transcribe.mechanisms.clipping import clipped_gradient_sum

    found = {}
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    for count in (1, 2):
        strategy = tf.distribute.MirroredStrategy(devices[:count])
        with strategy.scope():
            model = dp_step.make_net(net)
        step = replicated_step(strategy, model, clipped_gradient_sum)
        batch = dp_step.make_batch(model, 128)
        wall, _ = dp_step.alternate({"private": step}, batch, repeats)
        found[count] = {"private_examples_per_s": count * 128 / wall["private"]}
        logger.info("devices %d %s", count, found[count])
    return found


def replicated_step(strategy, model, clipped_gradient_sum):
    """Returns a step that sums bounded gradients over replicas, before any noise."""
    import tensorflow as tf

    def local(images, labels):
        total = clipped_gradient_sum(
            model,
            images,
            labels,
            lambda y, logits: tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits),
            l2_norm=1.0,
        )
        return tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, total.gradients
        )

    @tf.function
    def step(images, labels):
        sums = strategy.run(local, (images, labels))
        return strategy.experimental_local_results(sums[0])[0]

    return lambda images, labels: step(images, labels).numpy()


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--net", default="lenet", choices=dp_step.NETS)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--paths", default="ghost")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def main():
    import tensorflow as tf

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    tf.config.set_logical_device_configuration(cpu, two)
    batches = [int(size) for size in options.batches.split(",")]
    paths, parts = options.paths.split(","), options.parts.split(",")
    report = {"net": options.net, "repeats": options.repeats}
    if "batch" in parts:
        report["batch"] = by_batch(options.net, paths, batches, options.repeats)
    if "weights" in parts:
        report["weights"] = by_width(paths, options.repeats)
    if "devices" in parts:
        report["devices"] = by_devices(options.net, options.repeats)
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
