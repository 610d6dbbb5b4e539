"""Runner of the numeric tests under each instruction set of this processor: python tests/support/portable.py.

PyTorch, MKL and oneDNN select kernels by processor. With kernels of an older processor they round as that one does, so
bounds that hold on some processors only are found on one machine.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "default": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"MKL_CBWR": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "sve256": {},
}
"""Variables that select the instruction set in other libraries, by PyTorch's name of the instruction set."""
FOLDERS = ("model", "parallel", "pipeline", "optim", "generation", "evaluation")
LAYOUTS = "test_a_layout_trains_the_same_model and not (dp8 or tp8 or pp8 or dp4 or tp4 or pp4 or tp2-pp2-dp2)"
"""Layouts of one, two and four ranks; larger ones take long and round in the same ways."""


def environment(name):
    """Return the environment that selects the kernels of instruction set `name`."""
    return {**os.environ, "ATEN_CPU_CAPABILITY": name, **KERNELS[name]}


def capability(name):
    """Return the instruction set that PyTorch uses for `name`: an older one if the processor lacks it."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment(name)).strip()


def main():
    """Run the tests, print which instruction sets passed, and return the exit code."""
    names = {capability(name): name for name in reversed(KERNELS)}  # the first of several names for one set
    tests = [str(ROOT / "tests" / folder) for folder in FOLDERS]
    pytest = [sys.executable, "-m", "pytest", "--durations=3"]
    failed = []
    for used, name in sorted(names.items(), key=lambda item: list(KERNELS).index(item[1])):
        begun = time.perf_counter()
        print(f"== {used} (ATEN_CPU_CAPABILITY={name})", flush=True)
        layouts = [str(ROOT / "tests" / "train" / "test_layouts.py"), "-k", LAYOUTS]
        runs = [subprocess.run([*pytest, *args], cwd=ROOT, env=environment(name)) for args in (tests, layouts)]
        verdict = "passed" if not any(run.returncode for run in runs) else "FAILED"
        failed += [used] if verdict == "FAILED" else []
        print(f"== {used}: {verdict} in {time.perf_counter() - begun:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
