"""Prints `constraints.txt` from pip's report of everything that setup.py asks for.

    pip install --dry-run --ignore-installed --quiet --report report.json \
        '.[gpu,examples,serving,test,dev,docs]' setuptools==80.9.0
    python .ci/constraints.py report.json > constraints.txt
"""

import json
import sys
from pathlib import Path

HEADER = """\
# Every package behind setup.py, extras included, as resolved together on Python 3.11:
# `pip install -c constraints.txt ...`. Made by .ci/constraints.py, never by hand.
"""


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in report["install"]
    }
    found.pop("dp-transcribe", None)
    pins = "".join(f"{name}=={found[name]}\n" for name in sorted(found))
    sys.stdout.write(HEADER + pins)


if __name__ == "__main__":
    main()
