"""Tests, and what they share."""

import os

# Set before torch loads OpenMP: threads that wait in a loop would keep other processes (pytest -n) waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
