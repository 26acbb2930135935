"""The benches are scripts, not a package: their folder is on the path while they are imported, as when one is run.

Only meanwhile, because its `kernels.py` would be taken for Hugging Face's package of that name.
"""

import importlib
import sys
from pathlib import Path

_FOLDER = str(Path(__file__).resolve().parents[2] / "benches")

sys.path.insert(0, _FOLDER)
try:
    for _name in ("batch_run", "cpu", "kernel_case", "latency_rows", "random_model", "readme", "tiles"):
        importlib.import_module(_name)
    sys.modules["kernels_bench"] = importlib.import_module("kernels")
    del sys.modules["kernels"]
finally:
    sys.path.remove(_FOLDER)
