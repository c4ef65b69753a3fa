"""What the C++ backend reads: valid tokens of listed blocks, at any offset; lists are checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cpu_cases import DTYPES, assert_same, random_case, run
from far_memory import far_view
from torch import Tensor

from video_attn import BlockMask, attention

# -- what is never read ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_changes_nothing(dtype: torch.dtype):
    """NaN in unlisted key blocks and past valid lengths: the same bits as with ordinary numbers."""
    size, length = 24, 300
    q, k, v, mask = random_case(length=length, block_size=size, dtype=dtype, with_lens=True)
    keep = mask.to_dense()
    keep[..., 3] = keep[..., 7] = False  # key blocks that nobody lists
    mask = BlockMask.from_dense(
        keep, size, size, mask.q_block_lens, mask.kv_block_lens, q_len=length, kv_len=length
    )
    expected = run(q, k, v, mask)
    seen = mask.to_token_mask()
    keys_unread = ~seen.any(-2).any(1)
    queries_invalid = torch.arange(length) % size >= mask.q_lens().repeat_interleave(size, 1)[
        :, :length
    ]  # fmt: skip
    assert keys_unread.any() and queries_invalid.any()
    k, v = (
        x.detach().masked_fill(keys_unread[:, None, :, None], torch.nan).requires_grad_()
        for x in (k, v)
    )
    q = q.detach().masked_fill(queries_invalid[:, None, :, None], torch.nan).requires_grad_()
    assert_same(run(q, k, v, mask), expected)


def test_nan_key_reaches_only_its_queries():
    q, k, v, mask = random_case(heads=1, kv_heads=1, keep=0.3)
    k = k.detach().clone()
    k[1, 0, 40] = torch.nan
    out, lse = attention(q.detach(), k, v.detach(), mask, return_lse=True, backend="cpu")
    touched = mask.to_token_mask()[:, 0, :, 40] & torch.tensor([False, True])[:, None]
    assert touched.any() and not touched.all()
    assert torch.equal(out.isnan().all(-1)[:, 0], touched)
    assert torch.equal(out.isnan().any(-1)[:, 0], touched)
    assert torch.equal(lse.isnan()[:, 0], touched)


# -- strides, offsets, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("far", [0, 1, 2], ids=["batch", "head", "row"])
def test_offsets_past_2_31(far: int):
    """Inputs and outputs whose elements lie further apart than 32 bits can say."""
    dtype = torch.bfloat16
    near = [torch.randn(2, 2, 40, 16).to(dtype) for _ in range(3)]
    mask = random_case(length=40, block_size=16)[3]
    scale, sizes = 0.25, (None, None, 16, 16)
    lists = (mask.kv_num_blocks, mask.kv_indices)
    out, lse = torch.empty(2, 2, 40, 16, dtype=dtype), torch.empty(2, 2, 40)
    op = torch.ops.video_attn.cpu_attention_forward
    op(*near, *lists, *sizes, scale, False, out, lse)
    grads = [torch.empty_like(x) for x in near]
    backward = torch.ops.video_attn.cpu_attention_backward
    transposed = mask.transposed()
    backward(near[0], None, *near, out, lse, *transposed, *sizes, scale, False, *grads)

    def in_far_memory(x: Tensor) -> Tensor:
        return far_view((2, 2, 40, 16), far, dtype).copy_(x)

    for n in range(3):  # one far tensor at a time: each is 4 GiB of addresses
        inputs = list(near)
        inputs[n] = in_far_memory(near[n])
        far_lse = torch.empty_like(lse)
        far_out = in_far_memory(torch.zeros_like(out)) if n == 0 else torch.empty_like(out)
        op(*inputs, *lists, *sizes, scale, False, far_out, far_lse)
        assert torch.equal(far_out, out) and torch.equal(far_lse, lse)
        far_grads = [torch.empty_like(x) for x in near]
        far_grads[n] = in_far_memory(torch.zeros_like(near[n]))
        backward(near[0], None, *inputs, out, lse, *transposed, *sizes, scale, False, *far_grads)
        for x, y in zip(far_grads, grads, strict=True):
            assert torch.equal(x, y)


MEMORY_SCRIPT = """
import resource
import torch
from video_attn import BlockMask, attention

torch.set_num_threads(2)
attention(*(torch.randn(1, 1, 64, 128) for _ in range(3)), backend="cpu")  # loads everything
tokens, size = 2**33, 2**22
q = torch.randn(1, 1, 64, 128)
k, v = (torch.randn(1, 1, 1, 128).expand(1, 1, tokens, 128) for _ in range(2))
mask = BlockMask.from_indices(
    torch.tensor([3, 2047], dtype=torch.int32).view(1, 1, 1, 2), 64, size, q_len=64, kv_len=tokens,
    kv_block_lens=torch.full((1, 2048), 70, dtype=torch.int32),
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attention(q, k, v, mask, backend="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
torch.testing.assert_close(out, v[:, :, :64])  # the keys are all the same
"""


def test_memory_follows_the_attended_blocks():
    """8 billion keys, of which 2 blocks of 70 are seen: megabytes, not terabytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 64, f"{done.stdout.strip()} MiB more"


# -- bad lists -------------------------------------------------------------------------------------


def _with(**changes: object) -> Callable[[BlockMask], BlockMask]:
    return lambda mask: replace(mask, _transpose=None, **changes)


def _changed(name: str, value: int) -> Callable[[BlockMask], BlockMask]:
    def change(mask: BlockMask) -> BlockMask:
        lists = getattr(mask, name).clone()
        lists.view(-1)[1] = value
        return replace(mask, **{name: lists})

    return change


BAD_LISTS = {
    "index-too-large": (_changed("kv_indices", 4), r"kv_indices\[0, 0, 0, 1\].*below 4, got 4"),
    "index-negative": (_changed("kv_indices", -1), r"kv_indices\[0, 0, 0, 1\].*got -1"),
    "index-twice": (_changed("kv_indices", 0), r"ascending and below 4, got 0 after 0"),
    "count-too-large": (_changed("kv_num_blocks", 5), r"kv_num_blocks\[0, 0, 1\].*0 to 4, got 5"),
    "count-negative": (_changed("kv_num_blocks", -2), r"kv_num_blocks\[0, 0, 1\].*got -2"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_list_is_named(name: str):
    """Values of lists are read nowhere else: without this check they would be wild pointers."""
    change, message = BAD_LISTS[name]
    q, k, v, mask = random_case(length=64, block_size=16, keep=1.1)
    assert attention(q, k, v, mask, backend="cpu").isfinite().all()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        attention(q, k, v, change(mask), backend="cpu")


def test_bad_transpose_is_named():
    """Backward checks the lists that it reads itself."""
    q, k, v, mask = random_case(length=64, block_size=16, keep=1.1)
    counts, indices = mask.transposed()
    indices = indices.clone()
    indices[1, 1, 2, 3] = 9
    mask = replace(mask, _transpose=(counts, indices))
    out = attention(q, k, v, mask, backend="cpu")
    with pytest.raises(ValueError, match=r"q_indices\[1, 1, 2, 3\].*below 4, got 9 after 2"):
        out.sum().backward()


def test_direct_call_is_checked():
    """The operators do not trust their caller with memory."""
    q = torch.randn(1, 2, 32, 8)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 32)
    none = (None, None, None, None, 0, 0)
    forward = torch.ops.video_attn.cpu_attention_forward
    forward(q, q, q, *none, 0.3, False, out, lse)
    bad = (
        ((q, q[:, :, :, :4], q), (out, lse), ValueError, "k must have the head_dim of q, 8, got 4"),
        ((q, q, q[:, :, :9]), (out, lse), ValueError, "v must have the heads and tokens of k"),
        ((q, q.mT.contiguous().mT, q), (out, lse), ValueError, "k must have stride 1"),
        ((q, q.half(), q), (out, lse), TypeError, "k must be Float, got Half"),
        ((q, q, q), (out[:, :1], lse), ValueError, "out must be"),
        ((q, q, q), (out, lse.double()), TypeError, "lse must be Float, got Double"),
        ((q, q, q), (out, lse[:, :1]), ValueError, "lse must be"),
        ((q.double(),) * 3, (out.double(), lse), TypeError, "float32, bfloat16 or float16"),
    )
    for inputs, outputs, error, message in bad:
        with pytest.raises(error, match=message):
            forward(*inputs, *none, 0.3, False, *outputs)
