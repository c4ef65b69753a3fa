"""diffusers' context parallelism, enabled after apply(): two ranks give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("context_parallel_worker.py")


def test_ulysses_after_apply_and_ring_refused(tmp_path: Path) -> None:
    path = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path)], env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    for name in ("one", "per_head"):
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(saved["out"], saved["alone"], rtol=1e-4, atol=1e-5)
    for rank in range(2):
        refusal = (tmp_path / f"ring_{rank}.txt").read_text(encoding="utf-8")
        assert "ring_degree must be 1 with sparse attention, got 2" in refusal
