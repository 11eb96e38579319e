"""The parts of `make gpu-check`. They need no installed package: the checkout they lie in comes first."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "jinja2", "safetensors", "tqdm")):
    # spade_model imports all of them, for what is not measured here; its modules by themselves need none.
    sys.modules["spade_model"] = ModuleType("spade_model")
    sys.modules["spade_model"].__path__ = [str(ROOT / "spade_model")]
