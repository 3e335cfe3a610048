#!/usr/bin/env python3
"""The run.py of a kit: what it needs of mxforge lies beside it."""

from __future__ import annotations

import sys
from pathlib import Path

KIT = Path(__file__).resolve().parent
sys.path[:0] = [str(KIT), str(KIT / "scripts")]

from benchmarks.gpu_run import main  # noqa: E402 (found by the line above)

if __name__ == "__main__":
    sys.exit(main(KIT))
