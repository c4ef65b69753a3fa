"""The method "vsa" of nvidia-modelopt on our kernels; skipped where modelopt is not installed.

pip install nvidia-modelopt
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sparsity_cases import GRID, VideoAttention, defined, error, made, video
from torch import nn

import video_attn.sparsity as ours
from video_attn.integrations.attention_call import AttentionCall


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = VideoAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


@pytest.fixture
def mtsa() -> Iterator[Any]:
    """modelopt's package, under the name of its documentation, with our method registered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("modelopt.torch.sparsity.attention_sparsity")
    from modelopt.torch.sparsity.attention_sparsity.methods import registry

    yield package
    registry._SPARSE_ATTENTION_METHODS["vsa"].pop("v1.1", None)


def expected_of(module: Any, x: torch.Tensor, top_k: int, gate: Any) -> torch.Tensor:
    call = AttentionCall(*(
        project(x).unflatten(2, (2, -1)).transpose(1, 2)
        for project in (module.to_q, module.to_k, module.to_v)
    ))  # fmt: skip
    return defined(call, GRID, (4, 4, 4), top_k, gate).transpose(1, 2).flatten(2)


def test_the_documents_code_with_modelopt(mtsa: Any) -> None:
    """Its own import lines, its configuration, its wrapping of modules; our attention inside."""
    ours.register_with_modelopt()
    model, x = made(Model), video()
    custom_config = {
        "sparse_cfg": {
            "*attention*": {
                "method": "vsa",
                "block_size_3d": (4, 4, 4),
                "top_k_ratio": 0.3,
                "video_shape": GRID,
                "collect_stats": True,
                "enable": True,
            },
            "default": {"enable": False},
        },
    }
    expected = {gate: expected_of(model.attention, x, 3, gate) for gate in (1.0, 0.0)}
    model = mtsa.sparsify(model, config=custom_config)
    assert error(model(x), expected[1.0]) < 1e-5  # modelopt's meaning of no gate: the sum
    assert model.attention.get_stats()["average_sparsity"] == [1 - 3 / 8]
    ours.register_with_modelopt(gate=0.0)
    assert error(model(x), expected[0.0]) < 1e-5
    assert mtsa.is_attn_sparsified(model)


def test_its_messages_stay(mtsa: Any) -> None:
    method = ours.register_with_modelopt()({"top_k_ratio": 0.5})
    query = torch.randn(1, 2, 210, 8)
    with pytest.raises(ValueError, match="video_shape must be provided"):
        method.forward_attention(query, query, query)
    with pytest.raises(ValueError, match="does not match video shape"):
        method.forward_attention(query, query, query, video_shape=(4, 4, 4))
    gate = torch.randn(1, 2, 210, 8)
    out, stats = method.forward_attention(query, query, query, gate, video_shape=GRID)
    expected = defined(AttentionCall(query, query, query), GRID, (4, 4, 4), 4, gate)
    assert error(out, expected) < 1e-5
    assert (stats["top_k"], stats["total_blocks"], stats["sparse_blocks"]) == (4, 8, [4])
    with pytest.raises(TypeError):
        method.forward_attention(query, query, query, video_shapes=GRID)


def test_without_modelopt_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(ImportError, match="import video_attn.sparsity as mtsa"):
        ours.register_with_modelopt()
