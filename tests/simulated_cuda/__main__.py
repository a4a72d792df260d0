"""Run a module on simulated CUDA devices: `python tests/simulated_cuda -m srcfast calibrate CONFIG model.device=cuda`.

The environment variable SIMULATED_CUDA says how many devices there are (1). Under torchrun:
`torchrun --nproc-per-node=2 tests/simulated_cuda/__main__.py -m srcfast ...`, with SIMULATED_CUDA=2.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python tests/simulated_cuda -m MODULE [ARGUMENT ...]")
    sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]
    from simulated_cuda import VARIABLE, activate

    activate(int(os.environ.setdefault(VARIABLE, "1")))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
