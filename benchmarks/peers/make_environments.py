"""Makes a virtual environment for each peer that this project is compared with.

    python benchmarks/peers/make_environments.py --peers_dir=.peers
    python benchmarks/dp_step.py --peers_dir=.peers
    python benchmarks/membership.py --peers_dir=.peers

The peers' dependencies clash with each other's and with this project's. A network is
needed.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = {
    "opacus": ("torch==2.13.0", "opacus==1.6.0"),
    "jax_privacy": ("jax==0.10.2", "optax==0.2.8", "jax-privacy==2.0.0"),
    "empirical_privacy": (
        "absl-py==1.4.0",
        "immutabledict==2.2.5",
        "matplotlib==3.8.4",
        "numpy==1.26.4",
        "pandas==1.5.3",
        "scikit-learn==1.4.2",
        "scipy==1.11.4",
        "statsmodels==0.14.0",
    ),
}
# Installed without what it asks for: versions that Python 3.11 has no wheels of.
WITHOUT_DEPENDENCIES = {"empirical_privacy": ("tensorflow-empirical-privacy==0.1.0",)}


def make(folder, requirements, alone=()):
    """Makes one environment, unless it is complete already."""
    done = folder / "complete.txt"
    wanted = "\n".join([*requirements, *alone]) + "\n"
    if done.exists() and done.read_text() == wanted:
        return
    venv.create(folder, with_pip=True)
    install(folder, *requirements)
    if alone:
        install(folder, "--no-deps", *alone)
    done.write_text(wanted)


def install(folder, *requirements):
    """Installs into an environment, or says what is missing."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", *requirements]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"pip could not install {requirements} into {folder}: a network?")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers_dir", type=Path, default=Path(".peers"))
    parser.add_argument("--peers", default=",".join(REQUIREMENTS))
    options = parser.parse_args(arguments)
    for name in options.peers.split(","):
        if name not in REQUIREMENTS:
            sys.exit(f"Unknown peer {name!r}. Expected one of {list(REQUIREMENTS)}.")
        alone = WITHOUT_DEPENDENCIES.get(name, ())
        make(options.peers_dir.resolve() / name, REQUIREMENTS[name], alone)


if __name__ == "__main__":
    main()
