"""Memory of an import and an export: never the whole model twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support.conversion_memory

pytestmark = pytest.mark.slow


def test_peak_memory(tmp_path):
    """A model of 140 MB, in a process of its own: what other tests left in the allocator would be counted."""
    script = Path(support.conversion_memory.__file__)
    paths = [str(script.parent.parent), *sys.path]
    # Freed blocks go back to the system at once, so that the peak is that of what is in use.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=env, stdout=subprocess.PIPE, text=True, timeout=240, check=True
    )
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == 5
    assert all(peak < 1.3 for peak in peaks.values()), peaks
