"""Makes a virtual environment for each peer that `dp_step.py` measures.

    python benchmarks/peers/make_environments.py --peers_dir=.peers
    python benchmarks/dp_step.py --peers_dir=.peers

The peers' dependencies clash with each other's and with this project's.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = {
    "opacus": ("torch==2.13.0", "opacus==1.6.0"),
    "jax_privacy": ("jax==0.10.2", "optax==0.2.8", "jax-privacy==2.0.0"),
}


def make(folder, requirements):
    """Makes one environment, unless it is complete already."""
    done = folder / "complete.txt"
    wanted = "\n".join(requirements) + "\n"
    if done.exists() and done.read_text() == wanted:
        return
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", *requirements], check=True)
    done.write_text(wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers_dir", type=Path, default=Path(".peers"))
    parser.add_argument("--peers", default=",".join(REQUIREMENTS))
    options = parser.parse_args()
    for name in options.peers.split(","):
        if name not in REQUIREMENTS:
            sys.exit(f"Unknown peer {name!r}. Expected one of {list(REQUIREMENTS)}.")
        make(options.peers_dir.resolve() / name, REQUIREMENTS[name])


if __name__ == "__main__":
    main()
