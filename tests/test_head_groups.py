"""HeadGroups: every head by its own pattern, whatever the grouping; and schedules as files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from video_attn import (
    Dense,
    HeadGroup,
    HeadGroups,
    Radial,
    RadialRule,
    SlidingTile,
    VideoSparse,
    VideoTokens,
)
from video_attn.integrations import Schedule
from video_attn.integrations.schedule_file import (
    FORMAT,
    GroupEntry,
    ScheduleFile,
    StepsEntry,
    entry_of,
    write_schedule_file,
)

GRID, TILE, HEADS, DIM = (3, 4, 5), (2, 2, 2), 6, 16
WINDOWS = SlidingTile([(1, 1, 2), (2, 2, 1)], TILE)
SPARSE = VideoSparse(top_k_ratio=0.4, tile=TILE)
RULE = Radial(RadialRule(decay_factor=0.2, split_width=0, min_window=2), block_size=4)
MIXED = HeadGroups(
    [HeadGroup([0, 3], WINDOWS), HeadGroup([1, 2], SPARSE), HeadGroup([4], RULE),
     HeadGroup([5], Dense())]
)  # fmt: skip


def tensors(tokens: VideoTokens, kv_heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, tokens.sequence_length, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def one_by_one(groups: HeadGroups, q: Tensor, k: Tensor, v: Tensor, tokens: VideoTokens) -> Tensor:
    """Each head in a call of its own."""
    shared, heads = q.shape[1] // k.shape[1], {}
    for group in groups.groups:
        for i, head in enumerate(group.heads):
            part = (q[:, head, None], k[:, head // shared, None], v[:, head // shared, None])
            heads[head] = group.pattern.of_heads(i, i + 1).attend(*part, tokens)
    return torch.cat([heads[head] for head in range(q.shape[1])], 1)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("text", [0, 7])
def test_every_head_attends_by_its_own_pattern(kv_heads, text):
    tokens = VideoTokens(GRID, text)
    q, k, v = tensors(tokens, kv_heads)
    out, expected = MIXED.attend(q, k, v, tokens), one_by_one(MIXED, q, k, v, tokens)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_gate_and_a_precision_reach_their_heads():
    tokens = VideoTokens(GRID)
    q, k, v = (x.detach() for x in tensors(tokens))
    gate = torch.rand(2, HEADS, tokens.sequence_length, DIM)
    groups = HeadGroups(
        [HeadGroup([2, 4, 5], SPARSE), HeadGroup([0, 1, 3], Dense(), precision="sage_fp16")]
    )
    out = groups.attend(q, k, v, tokens, gate=gate)
    for head in (2, 4, 5):
        alone = SPARSE.attend(
            *(x[:, head, None] for x in (q, k, v)), tokens, gate=gate[:, head, None]
        )
        torch.testing.assert_close(out[:, head, None], alone, rtol=1e-5, atol=1e-6)
    exact = Dense().attend(q, k, v, tokens)
    for head in (0, 1, 3):
        error = (out[:, head] - exact[:, head]).norm() / exact[:, head].norm()
        assert 1e-5 < error < 0.03, "INT8 scores leave a trace, and no more"


def test_ranges_of_heads_and_density():
    tokens = VideoTokens(GRID)
    q, k, v = (x.detach() for x in tensors(tokens))
    whole = MIXED.attend(q, k, v, tokens)
    for start, stop in ((0, 3), (2, 6), (4, 5)):
        part = MIXED.of_heads(start, stop).attend(*(x[:, start:stop] for x in (q, k, v)), tokens)
        torch.testing.assert_close(part, whole[:, start:stop], rtol=1e-5, atol=1e-6)
    shares = [g.pattern.density(tokens, len(g.heads)) for g in MIXED.groups]
    assert MIXED.density(tokens) == pytest.approx(
        sum(n * share for n, share in zip((2, 2, 1, 1), shares, strict=True)) / HEADS
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadGroup([1, 0], Dense()), "ascending"),
        (lambda: HeadGroup([], Dense()), "at least one"),
        (lambda: HeadGroup([0], "dense"), "must be a pattern"),
        (lambda: HeadGroup([0], Dense(), "fp4"), "'fp4'"),
        (lambda: HeadGroup([0, 1, 2], WINDOWS), "3"),
        (lambda: HeadGroups([HeadGroup([0, 2], Dense())]), "each of the heads"),
        (lambda: HeadGroups([HeadGroup([0], Dense()), HeadGroup([0], Dense())]), "each of the"),
        (lambda: HeadGroups([]), "at least one"),
        (lambda: MIXED.check_heads(5), "6 query heads, but there are 5"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# -- files -----------------------------------------------------------------------------------------


def schedule_file(**changes: object) -> ScheduleFile:
    groups = [
        GroupEntry(heads=list(g.heads), pattern=entry_of(g.pattern), precision=g.precision)
        for g in MIXED.groups
    ]
    options = {
        "format": FORMAT, "num_steps": 10, "dense_layers": 1, "dense_first_steps": 0.1,
        "steps": [StepsEntry(first=4, layers={1: [GroupEntry(pattern=entry_of(RULE))]}),
                  StepsEntry(first=0, layers={1: groups})],
        "about": {"budget": 0.1},
    }  # fmt: skip
    return ScheduleFile(**options | changes)


def test_a_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "schedule.json"
    write_schedule_file(schedule_file(), path)
    schedule = Schedule.load(path)
    of_step = [schedule.patterns(SlidingTile((1, 1, 1)), 3, HEADS, step, 10) for step in range(10)]
    assert of_step[0] == [Dense()] * 3, "a tenth of ten steps is dense"
    assert of_step[3] == [Dense(), MIXED, SlidingTile((1, 1, 1))]
    assert of_step[4][1] == of_step[9][1] == RULE
    with pytest.raises(ValueError, match="10 steps, but this run has 20"):
        schedule.patterns(Dense(), 3, HEADS, 5, 20)


def test_a_file_without_steps_holds_for_every_run(tmp_path):
    path = tmp_path / "schedule.json"
    entry = StepsEntry(first=0, layers={1: [GroupEntry(pattern=entry_of(SPARSE))]})
    write_schedule_file(schedule_file(num_steps=None, steps=[entry], dense_first_steps=0), path)
    for steps in (4, 50):
        patterns = Schedule.load(path).patterns(Dense(), 3, HEADS, 1, steps)
        assert patterns == [Dense(), SPARSE, Dense()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no schedule"),
        ('{"format": "other"}', "format"),
        ('{"format": "video_attn schedule 1", "colour": 1}', "colour"),
        (
            '{"format": "video_attn schedule 1", "steps": [{"first": 0, "layers": {"0": [{"pattern"'
            ': {"kind": "sliding_tile", "window": [0, 1, 1]}}]}}]}',
            "window",
        ),
        (
            '{"format": "video_attn schedule 1", "steps": [{"first": 2, "layers": {}}]}',
            "say num_steps",
        ),
        (
            '{"format": "video_attn schedule 1", "steps": [{"first": 0, "layers": {"0": [{"pattern"'
            ': {"kind": "dense"}, "precision": "fp8"}]}}]}',
            "must name its heads",
        ),
    ],
)
def test_bad_files_say_where(tmp_path, content, message):
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Schedule.load(path)


def test_windows_per_head_and_rules_survive_the_file(tmp_path):
    for pattern in (WINDOWS, Radial([RadialRule(), "dense"]), VideoSparse(top_k=3, gate=None)):
        entry = StepsEntry(first=0, layers={0: [GroupEntry(pattern=entry_of(pattern))]})
        path = tmp_path / "schedule.json"
        write_schedule_file(ScheduleFile(format=FORMAT, steps=[entry]), path)
        assert json.loads(path.read_text())["format"] == FORMAT
        assert Schedule.load(path).patterns(Dense(), 1, 2) == [pattern]
