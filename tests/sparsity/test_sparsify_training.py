"""Training of sparsified models: checkpoints, LoRA, mixed precision, two ranks, a fine-tune."""

from __future__ import annotations

import pytest
import torch
from sparsity_cases import GRID, VideoModel, config, made, video
from tiny_models import MODELS, sharpen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import video_attn.sparsity as mtsa

TILE = (2, 2, 2)


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", ["wan", "ltx2", "hunyuan"])
def test_gradient_checkpointing_of_diffusers(name: str) -> None:
    """The second computation runs in the backward pass, when the transformer has returned."""
    tiny = MODELS[name]
    model = tiny.model().train()
    mtsa.sparsify(model, config("*", ratio=0.25, block_size_3d=TILE))
    mtsa.add_gates(model)

    def step() -> list[Tensor]:
        model.zero_grad()
        sum(
            x.float().square().mean() for x in model(**tiny.inputs(1), return_dict=False)
        ).backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    expected = step()
    gates = [x for n, x in model.named_parameters() if "gate_compress" in n]
    assert len(gates) == 2 * tiny.layers
    assert all(gate.grad is not None and gate.grad.any() for gate in gates)
    model.enable_gradient_checkpointing()
    assert same(step(), expected)
    assert model.blocks[0].attn1._sparse_attention.sparse_calls == 3 if name == "wan" else True
    mtsa.unsparsify(model)
    assert type(model._gradient_checkpointing_func).__name__ != "_Checkpoint"


def test_gradient_checkpointing_of_a_plain_model() -> None:
    """The shape in the configuration holds in the backward pass too."""
    model, x, text = made(VideoModel), video(), video(2, 5)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    expected = gradients(model, x, text)
    inner = model.forward

    def forward(x: Tensor, text: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, text, use_reentrant=False)
        return x

    model.forward = forward
    assert same(gradients(model, x, text), expected)
    model.forward = inner


def test_autocast() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    mtsa.sparsify(model, config(ratio=1.0, video_shape=GRID))
    mtsa.add_gates(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, text)
    mtsa.disable_sparse_attention(model, "*")
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(x, text)
    assert out.dtype == dense.dtype
    assert (out - dense).abs().max() < 0.1 * dense.std()


def test_lora() -> None:
    """Adapters around the projections, put in before or after; trained alone."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    outs = []
    for first in (True, False):
        model = made(VideoModel)
        torch.manual_seed(1)
        if first:
            mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
        model = peft.get_peft_model(model, lora)
        if not first:
            mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
        outs.append(model(video(), video(2, 5)))
        outs[-1].square().mean().backward()
        states = [m._sparse_attention for _, m in mtsa.get_named_sparse_attention_modules(model)]
        assert sum(state.sparse_calls for state in states) == 2
        trained = [n for n, p in model.named_parameters() if p.grad is not None]
        assert trained and all("lora" in name for name in trained)
    assert torch.equal(outs[0], outs[1])


def test_lora_by_hand() -> None:
    """The same without peft: a layer around a projection, under the names that peft gives."""

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    model = made(VideoModel)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    for block in model.blocks:
        block.attn1.to_q = Adapter(block.attn1.to_q)
    model(video(), video(2, 5)).square().mean().backward()
    assert [block.attn1._sparse_attention.sparse_calls for block in model.blocks] == [1, 1]
    assert model.blocks[0].attn1.to_q.up.weight.grad.any()


# -- a fine-tune -----------------------------------------------------------------------------------


def toy_video(step: int) -> tuple[Tensor, Tensor]:
    """Latents of a blob that moves over 4 x 4 x 4 tokens, and the noise on them."""
    generator = torch.Generator().manual_seed(step % 4)
    t, h, w = torch.meshgrid(*(torch.arange(4.0),) * 3, indexing="ij")
    place = torch.rand(2, generator=generator) * 3
    blob = torch.exp(-((h - place[0] - t / 4) ** 2 + (w - place[1]) ** 2))
    clean = blob[None, None] * torch.tensor([1.0, -1, 0.5, 2]).view(1, 4, 1, 1, 1)
    return clean, torch.randn(clean.shape, generator=generator)


def test_a_fine_tune_at_a_quarter_lowers_the_loss() -> None:
    """A tiny Wan, sparse with gates: flow matching on a moving blob."""
    config_ = MODELS["wan"].config | {"patch_size": (1, 1, 1)}
    import diffusers

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**config_)
    sharpen(model)
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE, collect_stats=True))
    gates = mtsa.add_gates(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, losses = torch.zeros(1, 2, 16), []
    for step in range(24):
        clean, noise = toy_video(step)
        out = model(clean / 2 + noise / 2, torch.tensor([500.0]), text, return_dict=False)[0]
        loss = (out - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert len(gates) == 2
    assert all(block.attn1.to_gate_compress.weight.any() for block in model.blocks)
    stats = model.blocks[0].attn1.get_stats()
    assert stats["total_calls"] == 24 and abs(stats["average_sparsity"] - 0.75) < 1e-6
