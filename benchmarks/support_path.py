"""Importing this module puts `tests` on the path, so that a script can import the helpers of `tests/support`."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"

if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))
