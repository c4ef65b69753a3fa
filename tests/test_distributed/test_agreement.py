"""A rank that differs, fails, is late or dies: an error on all ranks, and no hang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import PAIR, RANKS, RankPool

NAMES = {
    "tokens": "q must be cut as", "heads": "q (batch, heads, head_dim)", "dtype": "dtype of q",
    "scale": "scale", "shards": "shards", "mask": "blocks of mask",
    "grad": "which of q, k, v, gate require grad",
}  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_calls_that_differ(ranks: RankPool, what: str) -> None:
    kind = "ring" if what in ("mask", "shards") else "ulysses"
    messages = ranks.run(RANKS, "agreement_cases:different", what, kind)
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith("ValueError") and NAMES[what] in messages[0]
    if what in ("heads", "scale"):
        assert "rank 1: " in messages[0]


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_one_rank_fails_its_checks(ranks: RankPool, kind: str) -> None:
    first, second = ranks.run(len(PAIR), "agreement_cases:wrong_on_one", kind)
    assert second == "ValueError: scale must be a finite number > 0, got -1.0"
    assert first == f"PeerError: rank 1 of 2 failed: {second}"


def test_a_repeated_call_hears_the_others_at_its_end(ranks: RankPool) -> None:
    ahead, waiting = ranks.run(len(PAIR), "agreement_cases:repeated")
    assert ahead[:2] == waiting[:2] == ["no error"] * 2
    assert ahead[2] == "given up" and ahead[3] == waiting[2]
    assert waiting[2].startswith("ValueError: scale must be the same on all ranks")


def test_a_call_whose_host_reads_what_others_sent_waits_for_them(ranks: RankPool) -> None:
    assert ranks.run(len(PAIR), "agreement_cases:runs_ahead") == [[True, False]] * 2


@pytest.fixture
def own_ranks() -> Iterator[RankPool]:
    """Ranks whose connections break."""
    pool = RankPool()
    yield pool
    pool.close()


def test_one_rank_does_not_come_or_is_gone(own_ranks: RankPool) -> None:
    message = own_ranks.run(len(PAIR), "agreement_cases:late")[0]
    assert "rank 0 of 2 waited 0.5 s" in message
    for check in (True, False):
        own_ranks.close()
        own_ranks.start()
        left = own_ranks.run(len(PAIR), "agreement_cases:dies", check, gone=(1,))[0]
        if check:
            assert left.startswith("PeerError") and "did not come or is gone" in left
        else:
            assert left.startswith("RuntimeError"), left
