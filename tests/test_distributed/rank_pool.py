"""Processes that act as ranks: started once for a test session, they run one case after another."""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

RANKS = 4
PAIR = (1, 3)  # the ranks of groups of two: their ranks in the group are not those in the world
ANSWER_SECONDS = 150
# Imported once, by the process that the ranks are forked from.
PRELOADED = [
    "torch.distributed.tensor",
    "torch._dynamo",
    "video_attn.distributed",
    "video_attn.integrations",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.transformers.transformer_ltx2",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
]


class RankPool:
    """``RANKS`` processes with a gloo world, and in it the group ``PAIR``."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._ends, self._processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, port, sys.path, there), daemon=True
            )
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def run(
        self, size: int, case: str, *args: Any, gone: Sequence[int] = (), **kwargs: Any
    ) -> list[Any]:
        """``case`` ("module:function") on ``size`` ranks at once; what each returned; of those
        that are ``gone`` afterwards, None.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        ranks = range(RANKS) if size == RANKS else PAIR
        assert len(ranks) == size
        for rank in ranks:
            self._ends[rank].send((size, case, args, kwargs))
        answers = [
            (None, None) if place in gone else self._answer(rank, case)
            for place, rank in enumerate(ranks)
        ]
        failures = [f"rank {r}: {f}" for r, (_, f) in enumerate(answers) if f is not None]
        if failures:  # the others may be anywhere: the next case starts with new processes
            self.close()
            self.start()
        assert not failures, "\n".join(failures)
        return [value for value, _ in answers]

    def _answer(self, rank: int, case: str) -> tuple[Any, str | None]:
        if not self._ends[rank].poll(ANSWER_SECONDS):
            return None, f"{case}: rank {rank} gave no answer in {ANSWER_SECONDS} s"
        return self._ends[rank].recv()

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):  # it is gone already
                end.send(None)
        for process in self._processes:
            process.join(1)
            process.kill()


def _serve(rank: int, port: int, path: Sequence[str], end: Connection) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist
    from poison import poison_allocations

    torch.set_num_threads(1)
    poison_allocations()
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    groups = {RANKS: dist.group.WORLD, len(PAIR): dist.new_group(PAIR)}
    while (order := end.recv()) is not None:
        size, case, args, kwargs = order
        module, name = case.split(":")
        try:
            function = getattr(importlib.import_module(module), name)
            end.send((function(groups[size], *args, **kwargs), None))
        except BaseException:
            end.send((None, traceback.format_exc()))
    dist.destroy_process_group()
