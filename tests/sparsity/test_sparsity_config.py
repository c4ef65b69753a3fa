"""The configuration: what it accepts, what it refuses and in which words, how matches merge."""

from __future__ import annotations

from typing import Any

import pytest

from video_attn.integrations import Schedule
from video_attn.patterns.radial import RadialRule
from video_attn.sparsity import VSA_DEFAULT, SparseAttentionConfig, VSAAttributeConfig, VSAConfig
from video_attn.sparsity.config import given_attributes, merged, read_config, resolved
from video_attn.sparsity.matching import matches, near_names, no_match_message


def test_defaults_of_vsa() -> None:
    attributes = VSAAttributeConfig()
    assert attributes.method == "vsa"
    assert attributes.enable is True
    assert attributes.block_size_3d == (4, 4, 4)
    assert attributes.top_k_ratio == 0.5
    assert attributes.top_k is None
    assert attributes.video_shape is None
    assert attributes.collect_stats is False
    assert attributes.gate == "auto"
    assert attributes.on_unsupported == "raise"


def test_the_preset_and_the_class_say_the_same() -> None:
    assert VSA_DEFAULT["sparse_cfg"]["*attn*"]["method"] == "vsa"
    assert VSA_DEFAULT["sparse_cfg"]["default"] == {"enable": False}
    assert VSAConfig().sparse_cfg == read_config(VSA_DEFAULT).sparse_cfg


def test_lists_are_triples_too() -> None:
    attributes = VSAAttributeConfig(block_size_3d=[2, 3, 4], video_shape=[16, 28, 48])
    assert attributes.block_size_3d == (2, 3, 4)
    assert attributes.video_shape == (16, 28, 48)


@pytest.mark.parametrize("wrong, words", [
    ({"method": "flash_skip_softmax"}, "method must be one of vsa, sta, radial, dense"),
    ({"method": 3}, "method must be one of vsa"),
    ({"method": None}, "method must be one of vsa"),
    ({"top_k_ratio": 0}, "top_k_ratio must be in (0, 1]"),
    ({"top_k_ratio": 1.5}, "top_k_ratio must be in (0, 1]"),
    ({"top_k_ratio": float("nan")}, "top_k_ratio must be in (0, 1]"),
    ({"top_k_ratio": "half"}, "top_k_ratio must be a number"),
    ({"top_k_ratio": True}, "top_k_ratio must be a number"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 2.0}, "top_k"),
    ({"top_k": 2, "top_k_ratio": 0.5}, "give one, not 0.5 and 2"),
    ({"block_size_3d": (4, 4)}, "block_size_3d must have 3 elements"),
    ({"block_size_3d": (4, 0, 4)}, "block_size_3d must hold positive integers"),
    ({"block_size_3d": (4, 4.0, 4)}, "positive integers"),
    ({"block_size_3d": "444"}, "3 elements"),
    ({"video_shape": (16, 28)}, "video_shape must have 3 elements"),
    ({"video_shape": (16, -28, 48)}, "video_shape must hold positive integers"),
    ({"enable": "yes"}, "enable"),
    ({"collect_stats": 1}, "collect_stats"),
    ({"gate": "half"}, "gate"),
    ({"score_dtype": "int8"}, "score_dtype"),
    ({"precision": "int4"}, "precision must be one of native"),
    ({"backend": "abacus"}, "backend must be one of"),
    ({"on_unsupported": "ignore"}, "on_unsupported"),
    ({"schedule": {"dense_layer": 2}}, "dense_layer"),
    ({"schedule": {"dense_layers": -1}}, "dense_layers"),
    ({"threshold": 0.1}, "threshold"),
    ({"method": "sta", "top_k_ratio": 0.5}, "top_k_ratio"),
    ({"method": "sta", "window": (3, 3)}, "window must have 3 elements"),
    ({"method": "radial", "decay_factor": 0.0}, "decay_factor"),
    ({"method": "radial", "model_type": "ltx"}, "model_type"),
    ({"window": (3, 3, 3), "top_k_ratio": 0.5}, "keys of different methods"),
    ("vsa", "must be a dict"),
], ids=str)  # fmt: skip
def test_what_is_refused(wrong: Any, words: str) -> None:
    """With the name of what is wrong, wherever it stands, whether or not anything matches it."""
    for config in ({"sparse_cfg": {"*nothing*": wrong}}, {"sparse_cfg": {"default": wrong}}):
        with pytest.raises(ValueError) as error:
            read_config(config)
        assert words in str(error.value)


@pytest.mark.parametrize("wrong, error, words", [
    ({}, ValueError, "sparse_cfg"),
    ({"sparse_cfg": {}, "export": 1}, ValueError, "export"),
    ({"sparse_cfg": []}, ValueError, "must map patterns"),
    ({"sparse_cfg": {3: {}}}, ValueError, "a pattern must be"),
    ({"sparse_cfg": {"calibration": {}}}, ValueError, "none of the methods needs it"),
    ("vsa", TypeError, "config must be a dict"),
    (None, TypeError, "config must be a dict"),
], ids=str)  # fmt: skip
def test_what_is_no_configuration(wrong: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        read_config(wrong)
    assert words in str(raised.value)


def test_a_later_match_overrides_only_the_keys_it_gives() -> None:
    config = read_config({"sparse_cfg": {"default": {"enable": False, "collect_stats": True}}})
    matches_ = [{"method": "vsa", "top_k_ratio": 0.3}, {"top_k_ratio": 0.2}]
    given, attributes = config.attributes_of(matches_)  # "method" turns it on
    assert given == {"collect_stats": True, "method": "vsa", "top_k_ratio": 0.2}
    assert attributes == VSAAttributeConfig(top_k_ratio=0.2, collect_stats=True)


def test_another_method_keeps_what_all_share() -> None:
    vsa = {
        "method": "vsa",
        "top_k_ratio": 0.3,
        "block_size_3d": (2, 2, 2),
        "video_shape": (4, 4, 4),
    }
    sta = merged(vsa, {"method": "sta"})
    assert sta == {"method": "sta", "video_shape": (4, 4, 4)}
    assert resolved(sta).block_size_3d == (6, 8, 8)  # type: ignore[union-attr]
    assert merged(sta, {"method": "sta", "window": (1, 3, 3)})["video_shape"] == (4, 4, 4)


def test_of_two_measures_the_later_counts() -> None:
    assert merged({"method": "vsa", "top_k_ratio": 0.3}, {"top_k": 5}) == {
        "method": "vsa", "top_k": 5,
    }  # fmt: skip
    assert merged({"method": "vsa", "top_k": 5}, {"top_k_ratio": 0.3}) == {
        "method": "vsa", "top_k_ratio": 0.3,
    }  # fmt: skip


def test_what_is_said_of_the_switch_counts() -> None:
    off = {"method": "vsa", "enable": False}
    assert merged({}, off) == off
    assert merged(off, {"top_k_ratio": 0.2})["enable"] is False
    assert "enable" not in merged(off, {"method": "vsa"})
    assert resolved(merged({"enable": False}, {"method": "sta"})).enable  # type: ignore[union-attr]


def test_no_method_where_none_was_asked_for() -> None:
    assert resolved({}) is None
    assert resolved({"enable": False}) is None
    assert resolved({"enable": True}) == VSAAttributeConfig()
    assert resolved({"top_k_ratio": 0.25}) == VSAAttributeConfig(top_k_ratio=0.25)


def test_models_instead_of_dicts() -> None:
    config = SparseAttentionConfig(sparse_cfg={"*": VSAAttributeConfig(top_k_ratio=0.2)})
    assert config.sparse_cfg == {"*": {"method": "vsa", "top_k_ratio": 0.2}}
    assert read_config(config) is config
    assert given_attributes(VSAAttributeConfig()) == {"method": "vsa"}


def test_schedules_of_pipelines_are_taken() -> None:
    given = {"schedule": Schedule(dense_layers=1, dense_first_steps=2, dense_last_steps=3)}
    schedule = resolved(given).schedule  # type: ignore[union-attr]
    assert (schedule.dense_layers, schedule.dense_first_steps, schedule.dense_last_steps) == (
        1,
        2,
        3,
    )
    assert schedule.needs_step
    assert [schedule.is_dense_step(i, 10) for i in (1, 2, 6, 7)] == [True, False, False, True]
    share = resolved({"schedule": {"dense_first_steps": 0.25}}).schedule  # type: ignore[union-attr]
    assert [share.is_dense_step(i, 8) for i in (1, 2)] == [True, False]
    with pytest.raises(ValueError, match="overrides"):
        given_attributes({"schedule": Schedule(overrides={0: "dense"})})


def test_radial_rules() -> None:
    wan = resolved({"method": "radial", "model_type": "wan", "decay_factor": 0.5})
    assert wan.rule == RadialRule.for_model("wan", 0.5)  # type: ignore[union-attr]
    assert resolved({"method": "radial"}).rule == RadialRule()  # type: ignore[union-attr]
    given = {"method": "radial", "sink_frames": 2, "split_width": 0}
    assert resolved(given).rule == RadialRule(sink_frames=2, split_width=0)  # type: ignore[union-attr]


# -- patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, name, taken", [
    ("*.attn1", "blocks.0.attn1", True),
    ("*.attn1", "blocks.0.audio_attn1", False),
    ("*attn1", "blocks.0.audio_attn1", True),
    ("*attention*", "layer.self_attention", True),
    ("*Attention*", "layer.self_attention", False),
    ("*.audio_to_video*", "transformer_blocks.7.audio_to_video_attn", True),
    (lambda name: name.endswith("2"), "blocks.0.attn2", True),
])  # fmt: skip
def test_matches(pattern: Any, name: str, taken: bool) -> None:
    assert matches(pattern, name) is taken


def test_a_callable_answers_with_a_bool() -> None:
    with pytest.raises(TypeError, match="must return True or False, got 'yes'"):
        matches(lambda name: "yes", "attn")  # type: ignore[arg-type,return-value]


def test_near_names_show_one_of_each_kind() -> None:
    names = [f"blocks.{i}.{kind}" for i in range(30) for kind in ("attn1", "attn2", "ff_attention")]
    near = near_names("*.atn1", names)
    assert set(near) == {"blocks.*.attn1", "blocks.*.attn2", "blocks.*.ff_attention"}
    assert near[0] == "blocks.*.attn1"
    assert "'blocks.*.attn1'" in no_match_message("*.atn1", names)
    assert "has no attention modules" in no_match_message("*", [])
