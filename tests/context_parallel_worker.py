"""One of two ranks: Ulysses on a CPU by gloo. Run by tests/test_context_parallel.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import ContextParallelConfig
from tiny_models import random
from tiny_wan import PATTERN, tiny_transformer
from torch import distributed

from video_attn import SlidingTile
from video_attn.integrations import Schedule, apply

PATTERNS = {
    "one": PATTERN,
    "per_head": SlidingTile([(1, 1, 2), (2, 2, 1)], PATTERN.tile),
}


def main(rank: int, folder: Path) -> None:
    """Saves what this rank computes with parallelism enabled after apply()."""
    torch.accelerator.device_count = lambda: 1
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    inputs = {
        "hidden_states": random(1, 16, 3, 8, 8),  # 48 tokens: 24 on each rank
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": random(1, 6, 16),
    }
    for name, pattern in PATTERNS.items():
        model = tiny_transformer()
        with torch.no_grad(), apply(model, pattern, schedule=Schedule(dense_layers=1)) as handle:
            if rank == 0:
                alone = model(**inputs, return_dict=False)[0]
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
            out = model(**inputs, return_dict=False)[0]
            if rank == 0:
                torch.save({"alone": alone, "out": out}, folder / f"{name}.pt")
                assert (handle.sparse_calls, handle.dense_calls) == (2, 2), handle
    model = tiny_transformer()
    with torch.no_grad(), apply(model, PATTERN):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
        try:
            model(**inputs, return_dict=False)
        except ValueError as error:
            (folder / f"ring_{rank}.txt").write_text(str(error), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
