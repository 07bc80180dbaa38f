"""`python -m dp_transcribe`: see `dp_transcribe.cli`."""

import sys

from dp_transcribe.cli import main

if __name__ == "__main__":
    sys.exit(main())
