"""Tries a wheel in each of several Pythons that have torch, without a compiler in sight, and prints a table.

    python tests/check_wheel.py WHEEL_FOLDER PYTHON [PYTHON ...]

For each interpreter the wheel of its version is taken. The exit status is 1 if one of them does not run its compiled
kernels, or if they differ from plain PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_TAG = "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')"
_TRY = """
import sys, warnings
warnings.simplefilter("error", RuntimeWarning)
sys.path.insert(0, sys.argv[1])
import torch, spade_kernels as sk
assert sk.__file__.startswith(sys.argv[1]), sk.__file__
labels, x = torch.randint(0, 5, (2, 32, 32)), torch.randn(2, 16, 16, 16)
layer = sk.SPADE("spadebatch3x3", 16, 5)

def gradients(backend):
    sk.use_backend(backend)
    layer.zero_grad()
    y = layer(x, sk.LabelMap(labels, 5), 0.2, upsample=2)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters())]

pairs = zip(gradients("cpu"), gradients("reference"))
difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
assert difference < 1e-4, difference
result = f"kernels run, differ from plain PyTorch by {difference:.0e}"
print(f"| {sys.version.split()[0]} | {torch.__version__} | {result} |")
"""


def main(folder: str, *pythons: str) -> int:
    failed = False
    print("| Python | torch | result |\n|---|---|---|")
    for python in pythons:
        python = str(Path(python).absolute())
        tag = subprocess.run([python, "-c", _TAG], capture_output=True, text=True, check=True).stdout.strip()
        wheel = next(Path(folder).glob(f"*-{tag}-{tag}-*.whl"), None)
        if wheel is None:
            print(f"| {tag} | | no wheel of this version in {folder} |")
            failed = True
            continue
        with tempfile.TemporaryDirectory() as target:
            zipfile.ZipFile(wheel).extractall(target)
            done = subprocess.run(
                [python, "-c", _TRY, target], capture_output=True, text=True, env={"PATH": "/nowhere"}, cwd=target
            )
        failed |= done.returncode != 0
        last = done.stderr.strip().splitlines()[-1:] or ["nothing was printed"]
        print(done.stdout.strip() if done.returncode == 0 else f"| {python} | | {last[0]} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
