"""Scenes: which latent frames belong to which, who may see whom, and what reaches the mask."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from radial_oracle import Definition, allowed_pairs, block_mask, frame_scenes

from radial_attn.attn_mask import SceneAwareMaskMap
from video_attn import VideoLayout
from video_attn.patterns.radial import RadialRule, frame_density, frame_windows, radial_mask
from video_attn.patterns.scene import Scenes

# The example of the documentation: 49 pixel frames are 13 latent ones.
BOUNDARIES = [0, 15, 30, 45]
ADJACENCY = [[True, True, False], [True, True, True], [False, True, True]]


@pytest.mark.parametrize("straddle, starts", [
    ("both", [(0, 5), (4, 8), (8, 13)]),
    ("later", [(0, 4), (4, 8), (8, 13)]),
    ("earlier", [(0, 5), (5, 9), (9, 13)]),
])  # fmt: skip
def test_the_documented_example(straddle: str, starts: list[tuple[int, int]]) -> None:
    """Pixel 15 lies inside latent 4 (pixels 13 to 16), pixel 30 inside latent 8 (29 to 32)."""
    scenes = Scenes(BOUNDARIES, ADJACENCY, straddle=straddle)
    member = scenes.membership(13)
    expected = torch.zeros(13, 3, dtype=torch.bool)
    for scene, (first, end) in enumerate(starts):
        expected[first:end, scene] = True
    if straddle == "both":
        expected[8, 1] = True
    assert torch.equal(member, expected)
    pairs = scenes.frame_pairs(13)
    assert not pairs[0, 12] and not pairs[12, 0] and pairs[6, 0] and pairs[6, 12]


@pytest.mark.parametrize("frames, compression, patch, padding", [
    (13, 4, 1, 0), (6, 4, 1, 0), (11, 4, 2, 1), (11, 4, 2, 0), (7, 6, 1, 0), (5, 8, 3, 2),
    (9, 1, 1, 0),
])  # fmt: skip
def test_membership_equals_the_definition(
    frames: int, compression: int, patch: int, padding: int
) -> None:
    choose = random.Random(frames * 100 + patch)
    pixels = 1 + (frames * patch - padding - 1) * compression
    for _ in range(8):
        count = choose.randint(1, min(4, pixels - 1))
        boundaries = [0, *sorted(choose.sample(range(1, pixels), count))]
        scenes = len(boundaries) - 1
        adjacency = [
            [i == j or choose.random() < 0.5 for j in range(scenes)] for i in range(scenes)
        ]
        described = Scenes(
            boundaries, adjacency, temporal_compression=compression, temporal_patch=patch,
            padding_latents=padding,
        )  # fmt: skip
        expected = frame_scenes(boundaries, frames, compression, patch, padding)
        member = described.membership(frames)
        assert [set(row.nonzero().flatten().tolist()) for row in member] == expected
        pairs = torch.tensor(allowed_pairs(expected, adjacency))
        assert torch.equal(described.frame_pairs(frames), pairs)
        for straddle, pick in (("earlier", min), ("later", max)):
            single = [{pick(s)} for s in expected]
            if set().union(*single) == set(range(scenes)):
                chosen = replace(described, straddle=straddle).frame_pairs(frames)
                assert torch.equal(chosen, torch.tensor(allowed_pairs(single, adjacency)))


@pytest.mark.parametrize("sink, exempt", [("obey", False), ("exempt", True)])
@pytest.mark.parametrize("number", range(12))
def test_masks_with_scenes_equal_the_definition(number: int, sink: str, exempt: bool) -> None:
    choose = random.Random(number)
    frames, tokens = choose.randint(3, 8), choose.randint(5, 30)
    cuts = sorted(choose.sample(range(1, frames), choose.randint(1, 2)))
    boundaries = [0, *cuts, frames]
    adjacency = [
        [i == j or choose.random() < 0.4 for j in range(len(cuts) + 1)]
        for i in range(len(cuts) + 1)
    ]
    scenes = Scenes(boundaries, adjacency, unit="latent", sink=sink)
    of_frame = [{max(k for k, b in enumerate(boundaries[:-1]) if b <= t)} for t in range(frames)]
    definition = Definition(
        frames, tokens, choose.choice((4, 8, 16)), choose.choice((0, 9)), choose.random() < 0.5,
        decay=0.5, split=choose.choice((0, 16)), sink=choose.choice((0, 1, 2)),
        allowed=tuple(map(tuple, allowed_pairs(of_frame, adjacency))), sink_exempt=exempt,
    )  # fmt: skip
    layout = VideoLayout(
        (frames, 1, tokens), (1, 1, tokens), definition.text, definition.text_first
    )
    rule = RadialRule(decay_factor=0.5, split_width=definition.split, sink_frames=definition.sink)
    mask = radial_mask(layout, rule, block_size=definition.block, scenes=scenes)
    assert torch.equal(mask.to_dense()[0, 0], block_mask(definition))
    assert (mask.kv_num_blocks > 0).all()


@pytest.mark.parametrize("adjacency", ["adjacent", "all", "one way"])
def test_forms_of_adjacency(adjacency: str) -> None:
    expected = {
        "adjacent": [[1, 1, 0], [1, 1, 1], [0, 1, 1]],
        "all": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        "one way": [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    }[adjacency]
    given = (lambda query, key: key <= query) if adjacency == "one way" else adjacency
    scenes = Scenes([0, 1, 2, 3], given, unit="latent")
    assert torch.equal(scenes.frame_pairs(3), torch.tensor(expected, dtype=torch.bool))
    same = Scenes((0, 1, 2, 3), torch.tensor(expected, dtype=torch.bool), unit="latent")
    assert scenes == same and hash(scenes) == hash(same)


def test_a_matrix_of_frames_is_the_level_below() -> None:
    matrix = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    matrix |= torch.eye(7, dtype=torch.bool)
    assert torch.equal(Scenes.of_frames(matrix).frame_pairs(7), matrix)
    assert torch.equal(Scenes.of_frames(matrix.tolist()).frame_pairs(7), matrix)


def test_asymmetric_scenes_make_an_asymmetric_mask() -> None:
    layout = VideoLayout((6, 4, 4), (1, 4, 4))
    one_way = Scenes([0, 3, 6], [[True, False], [True, True]], unit="latent")
    density = frame_density(
        layout, radial_mask(layout, RadialRule(split_width=0), block_size=8, scenes=one_way)
    )
    assert (density[:3, 3:] == 0).all()
    assert (density[3:, :3] > 0).all()


def test_sinks() -> None:
    """Of the rule: under the adjacency or exempt from it. Of scenes: their first frames."""
    layout = VideoLayout((6, 4, 4), (1, 4, 4))
    rule = RadialRule(decay_factor=0.01, split_width=0, min_window=0, sink_frames=1)
    apart = Scenes([0, 3, 6], [[True, False], [False, True]], unit="latent")
    windows = frame_windows(layout, rule, 8, apart)
    assert windows[:3, 0].tolist() == [16, 16, 16]
    assert windows[3:, 0].tolist() == [-1, -1, -1]
    exempt = frame_windows(layout, rule, 8, replace(apart, sink="exempt"))
    assert exempt[:, 0].tolist() == [16] * 6
    assert torch.equal(exempt[:, 1:], windows[:, 1:])
    scene_sink = frame_windows(layout, rule, 8, replace(apart, scene_sink=True))
    assert scene_sink[3:, 3].tolist() == [16, 16, 16] and windows[5, 3] == 0
    assert scene_sink[:3, 3].tolist() == [-1, -1, -1]
    connected = Scenes([0, 3, 6], "all", unit="latent", scene_sink=True)
    assert frame_windows(layout, rule, 8, connected)[:, 3].tolist() == [16] * 6


def test_density_of_scene_pairs() -> None:
    layout = VideoLayout((7, 4, 6), (1, 4, 6), 5, text_first=True)
    scenes = Scenes([0, 2, 7], [[True, False], [True, True]], unit="latent")
    mask = radial_mask(layout, RadialRule(split_width=0), block_size=8, scenes=scenes)
    tokens = mask.to_token_mask()[0, 0, 5:, 5:].double()
    first, second = slice(0, 48), slice(48, 168)
    density = scenes.density(frame_density(layout, mask))
    for i, rows in enumerate((first, second)):
        for j, columns in enumerate((first, second)):
            assert density[i, j].item() == pytest.approx(tokens[rows, columns].mean().item())


def test_boundaries_before_the_end_and_strict() -> None:
    """Frames after the last boundary join the last scene: 45 to 48 of 49 are of scene 2."""
    assert Scenes(BOUNDARIES, ADJACENCY).membership(13)[12].tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"must end with 49 pixel frames \(strict\), got 45"):
        Scenes(BOUNDARIES, ADJACENCY, strict=True).membership(13)
    for end in (49, 50, 52):  # the VAE makes 13 latents of all of them
        Scenes([0, 15, 30, end], ADJACENCY, strict=True).membership(13)
    with pytest.raises(ValueError, match="within the video of 49 pixel frames, got 53"):
        Scenes([0, 15, 30, 53], ADJACENCY).membership(13)
    with pytest.raises(
        ValueError, match="within the video of 13 latent frames, got 45; are they p"
    ):
        Scenes(BOUNDARIES, ADJACENCY, unit="latent").membership(13)
    with pytest.raises(ValueError, match=r"scene 1 \(pixel frames 14 to 14\) gets none of the 13"):
        Scenes([0, 14, 15, 49], "adjacent", straddle="earlier").membership(13)


@pytest.mark.parametrize("change, error, words", [
    ({"boundaries": 45}, TypeError, "boundaries must be a sequence of ints, got 45"),
    ({"boundaries": "0,3"}, TypeError, "boundaries"),
    ({"boundaries": [0, 2.5]}, TypeError, "boundaries must be ints"),
    ({"boundaries": [0]}, ValueError, "boundaries must be at least two ints"),
    ({"boundaries": [1, 3]}, ValueError, "start with 0"),
    ({"boundaries": [0, 15, 15, 45]}, ValueError, "rise, got"),
    ({"adjacency": "next"}, ValueError, "adjacency must be 'adjacent', 'all'"),
    ({"adjacency": 3}, TypeError, "adjacency"),
    ({"adjacency": [[True]]}, ValueError, "adjacency must be 3 x 3"),
    ({"adjacency": [True, True, True]}, ValueError, "adjacency must be 3 x 3"),
    ({"adjacency": [[1, 0.5, 0]] * 3}, TypeError, "adjacency must hold booleans"),
    ({"adjacency": [[True, True, False], [True, False, True], [False, True, True]]}, ValueError,
     "adjacency must be True on the diagonal"),
    ({"unit": "seconds"}, ValueError, "unit must be one of pixel, latent; got 'seconds'"),
    ({"straddle": "none"}, ValueError, "straddle must be one of both, earlier, later"),
    ({"sink": True}, ValueError, "sink must be one of obey, exempt"),
    ({"scene_sink": 1}, TypeError, "scene_sink must be True or False"),
    ({"strict": None}, TypeError, "strict"),
    ({"temporal_compression": 0}, ValueError, "temporal_compression must be >= 1"),
    ({"temporal_patch": 1.0}, TypeError, "temporal_patch must be an int"),
    ({"padding_latents": 1}, ValueError, "padding_latents must be less than temporal_patch 1"),
])  # fmt: skip
def test_wrong_scenes_are_refused(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Scenes(**({"boundaries": BOUNDARIES, "adjacency": ADJACENCY} | change))


# -- SceneAwareMaskMap -----------------------------------------------------------------------------


TOKENS = 301  # of a latent frame; in frames of fewer than 256 the split drops neighbours


def scene_map(**change: object) -> SceneAwareMaskMap:
    """The call of the documentation, with small frames."""
    arguments: dict = {
        "video_token_num": 13 * TOKENS,
        "num_frame": 49,
        "scene_boundaries": BOUNDARIES,
        "scene_adjacency_matrix": ADJACENCY,
    }
    return SceneAwareMaskMap(**(arguments | change))


@pytest.mark.parametrize("text, text_first", [(0, False), (10, True)])
def test_scene_aware_mask_map(text: int, text_first: bool) -> None:
    masks = scene_map(text_first=text_first)
    query = torch.zeros(2, 13 * TOKENS + text, 3, 8)
    layout = VideoLayout((13, 1, TOKENS), (1, 1, TOKENS), text, text_first)
    rule = RadialRule.for_model("cogvideox", 1.0)
    expected = radial_mask(layout, rule, block_size=32, scenes=Scenes(BOUNDARIES, ADJACENCY))
    options = {"block_size": 32, "decay_factor": 1.0}
    assert torch.equal(masks.queryLogMask(query, "radial", **options), expected.to_dense()[0, 0])
    first = masks.block_mask(query, **options)
    assert first.kv_indices.data_ptr() == masks.block_mask(query, **options).kv_indices.data_ptr()
    plain = scene_map(scene_boundaries=None, scene_adjacency_matrix=None, text_first=text_first)
    assert plain.block_mask(query, **options).density() > first.density()
    density = masks.scene_density(query, **options)
    assert density.shape == (3, 3) and density[0, 0] > density[0, 2]


def test_units_of_scene_aware_mask_map() -> None:
    query = torch.zeros(13 * TOKENS, 1, 8)
    latent = scene_map(num_frame=13, scene_boundaries=[0, 4, 8, 13], unit="latent")
    later = scene_map(straddle="later")
    assert torch.equal(
        latent.queryLogMask(query, block_size=32), later.queryLogMask(query, block_size=32)
    )
    frames = scene_map(
        num_frame=13, unit="latent", scene_boundaries=None,
        scene_adjacency_matrix=Scenes(BOUNDARIES, ADJACENCY).frame_pairs(13),
    )  # fmt: skip
    both = scene_map()
    assert torch.equal(
        frames.queryLogMask(query, block_size=32), both.queryLogMask(query, block_size=32)
    )
    patched = scene_map(
        video_token_num=11 * TOKENS, num_frame=81, temporal_patch=2,
        scene_boundaries=[0, 27, 54, 81],
    )  # fmt: skip
    assert patched.num_frame == 11 and patched.scenes.padding_latents == 1


@pytest.mark.parametrize("change, words", [
    ({"num_frame": 13}, "3913 is not a multiple of 4 frames of tokens, which 13 pixel.*'latent'"),
    ({"num_frame": 49, "unit": "latent"}, "multiple of 49 frames of tokens, which 49 latent"),
    ({"num_frame": 0}, "multiple of 0 frames"),
    ({"scene_adjacency_matrix": None}, "scene_adjacency_matrix must be given"),
    ({"scene_boundaries": None}, "adjacency must be 13 x 13"),
    ({"scene_boundaries": [0, 20, 40, 60]}, "within the video of 49 pixel frames, got 60"),
    ({"strict": True}, "strict"),
    ({"unit": "second"}, "unit"),
])  # fmt: skip
def test_wrong_scene_aware_mask_maps_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scene_map(**change)


def test_scene_density_needs_scenes() -> None:
    plain = scene_map(scene_boundaries=None, scene_adjacency_matrix=None)
    with pytest.raises(ValueError, match="scene_boundaries were not given"):
        plain.scene_density(torch.zeros(13 * TOKENS, 1, 8))
