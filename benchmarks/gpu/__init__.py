"""The parts of `make gpu-check`. They need no installed package: the checkout they lie in comes first."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
