"""Small models for the tests of sparsify, and video sparse attention by its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from oracle import attention_oracle
from torch import Tensor, nn
from torch.nn import functional as F
from vsa_definition import NONE, TEXT, Tokens, definition, tile_numbers, tile_scores

from video_attn.integrations.attention_call import AttentionCall
from video_attn.layout import Triple

GRID: Triple = (5, 6, 7)  # ragged under 4x4x4: 2 x 2 x 2 tiles
LENGTH = math.prod(GRID)
WIDTH, HEADS = 32, 2


class VideoAttention(nn.Module):
    """The example of the original document, with a forward; ``context``: cross-attention."""

    def __init__(self, hidden_dim: int = WIDTH, num_heads: int = HEADS, gate: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_dim, hidden_dim)
        self.to_k = nn.Linear(hidden_dim, hidden_dim)
        self.to_v = nn.Linear(hidden_dim, hidden_dim)
        if gate:
            self.to_gate_compress = nn.Linear(hidden_dim, hidden_dim)
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        query, key, value = (
            project(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        out = F.scaled_dot_product_attention(query, key, value, **self.options)
        return out.transpose(1, 2).flatten(2)


class FusedAttention(nn.Module):
    """One matrix for q, k and v, grouped key heads, names of another school."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, WIDTH + 16)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).split([WIDTH, 8, 8], -1)
        query = query.unflatten(2, (4, -1)).transpose(1, 2)
        key, value = (y.unflatten(2, (1, -1)).transpose(1, 2) for y in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class VideoModel(nn.Module):
    """Two blocks of self-attention and cross-attention."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(gate) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


class Block(nn.Module):
    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn1 = VideoAttention(gate=gate)
        self.attn2 = VideoAttention()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(self.norm(x))
        x = x + self.attn2(x, text)
        return x + torch.tanh(self.mlp(x))


def made(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """The module with weights that make attention sharp enough for a mask to matter."""
    torch.manual_seed(seed)
    module = build().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("to_q", "to_k", "in_proj_weight", "qkv.weight")):
                parameter.mul_(3)
    return module


def video(batch: int = 2, length: int = LENGTH, seed: int = 1, dtype: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator).to(dtype or torch.float32)


def attention_of(module: Any, x: Tensor) -> AttentionCall:
    """What a VideoAttention asks of attention."""
    heads = [
        project(x).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.to_q, module.to_k, module.to_v)
    ]
    return AttentionCall(*heads)


def vsa(ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"method": "vsa", "top_k_ratio": ratio, **more}


def config(pattern: Any = "*attn1", **attributes: Any) -> dict[str, Any]:
    """A configuration with one pattern, and all others off."""
    return {"sparse_cfg": {pattern: vsa(**attributes), "default": {"enable": False}}}


def defined(
    call: AttentionCall,
    grid: Triple,
    tile: Triple,
    top_k: int,
    gate: Tensor | float = 0.0,
    *,
    text_first: bool = False,
    valid: tuple[int, ...] | None = None,
) -> Tensor:
    """Video sparse attention in fp64, from token coordinates; the choice of tiles too."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    numbers = tile_numbers(grid, tile)
    text = query.shape[2] - len(numbers)
    rows = []
    for item in range(query.shape[0]):
        kept = text if valid is None else valid[item]
        beside = [TEXT] * kept + [NONE] * (text - kept)
        rows.append(beside + numbers if text_first else numbers + beside)
    tokens = Tokens(rows, rows, max(numbers) + 1, max(numbers) + 1)
    scores = tile_scores(query, key, tokens)
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :top_k]
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    weight = gate.double() if isinstance(gate, Tensor) else gate
    out = definition(query, key, value, tokens, selected, weight, attention_oracle)
    return out.to(call.query.dtype)


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference in standard deviations of what is expected."""
    return float(((got - expected).abs().max() / expected.std()).detach())


def defined_output(module: Any, x: Tensor, grid: Any, top_k: int, gate: Any = 0.0) -> Tensor:
    out = defined(attention_of(module, x), grid, (4, 4, 4), top_k, gate)
    return out.transpose(1, 2).flatten(2)
