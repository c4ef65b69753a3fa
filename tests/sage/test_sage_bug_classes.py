"""What went wrong in other INT8 and FP8 attention kernels, each held by a test.

| what went wrong | held by |
|---|---|
| 32-bit offsets | test_sage_emulation.py: test_offsets_beyond_32_bits |
| fewer than 64 keys: stale memory | test_sage_emulation.py: test_short_and_odd_sequences |
| a channel of zeros divides by zero | test_sage_emulation.py: test_zeros_give_zeros |
| a row without keys stays unwritten | test_sage_emulation.py: test_block_lists |
| launches on the default stream | here, and test_sage_gpu.py: test_the_current_stream_is_used |
| arguments swallowed | here |
| padded heads: padding in the result, scale of the padded size | here |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import sage_emulation
import token_masks
import torch
from sage_problems import SUMS, make_codes, qkv, random_mask, relative_error, run

from video_attn import attention
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions

needs_emulation = pytest.mark.skipif(
    sage_emulation.missing() is not None, reason=f"host emulation: {sage_emulation.missing()}"
)


@pytest.fixture(params=[89, 90])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with sage_emulation.options(capability=request.param):
        yield


# -- arguments -------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_option_changes_something(precision, kernel):
    q, k, v = qkv((100, 200))
    v = v - v.mean(2, keepdim=True)  # a mean that every row has would hide the rest
    plain = run(q, k, v, precision=precision)
    for changes in (
        {"granularity": "per_thread"}, {"granularity": "per_block"}, {"smooth_k": False},
        {"smooth_v": True}, {"smooth_q": True}, {"hadamard": True},
        {"pv_accumulation": SUMS[precision]},
    ):  # fmt: skip
        out, _ = run(q, k, v, precision=precision, options=QuantizationOptions(**changes))
        assert not torch.equal(out, plain[0]), changes
        assert relative_error(out, plain[0]) < 0.1, changes
    for arguments in ({"is_causal": True}, {"scale": 0.5}):
        assert relative_error(run(q, k, v, precision=precision, **arguments)[0], plain[0]) > 0.1


@needs_emulation
def test_every_argument_of_the_operator_changes_something(kernel):
    q, k, v = qkv((128, 192))
    options = QuantizationOptions(smooth_v=True, smooth_q=True)
    codes = make_codes(q, k, v, None, scale=0.1, precision="sage_fp8", options=options)
    mask = random_mask((64, 64), (128, 192))

    def lens(*values: int) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.int32)

    def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.empty(1, 2, 128, 64), torch.empty(1, 2, 128)
        arguments: dict[str, Any] = codes._asdict() | {
            "kv_num_blocks": None, "kv_indices": None, "q_lens": None, "kv_lens": None,
            "q_block_size": 64, "kv_block_size": 64, "kv_len": 192, "scale": 0.1,
            "is_causal": False, "half_sums": False, "places": None,
        }  # fmt: skip
        assert arguments.keys() >= changes.keys()
        torch.ops.video_attn.sage_attention(*(arguments | changes).values(), out, lse)
        return out, lse

    plain = call()
    lists = {"kv_num_blocks": mask.kv_num_blocks, "kv_indices": mask.kv_indices}
    for changes in (
        lists, {"q_lens": lens(64, 5)}, {"kv_lens": lens(64, 64, 5)}, {"kv_len": 150},
        {"scale": 0.2}, {"is_causal": True}, {"half_sums": True}, {"v_mean": None},
        {"lse_shift": None}, {"score_shift": None}, {"v_scale": codes.v_scale * 2},
        {"q_scale": codes.q_scale * 2}, {"k_scale": codes.k_scale * 2},
        {"q_lens": lens(128), "q_block_size": 128},
    ):  # fmt: skip
        same = all(torch.equal(a, b) for a, b in zip(call(**changes), plain, strict=True))
        assert same == ("q_block_size" in changes), changes


def test_unknown_arguments_are_errors():
    q, k, v = qkv()
    for name in ("attn_mask", "smooth_k", "sm_scale", "dropout_p", "pv_accum_dtype"):
        with pytest.raises(TypeError, match=name):
            attention(q, k, v, precision="sage_fp8", **{name: None})
    with pytest.raises(TypeError, match="accumulation"):
        QuantizationOptions(accumulation="fp32")  # type: ignore[call-arg]


# -- padded heads ----------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("dims", [(8, 8), (72, 72), (96, 40), (40, 96)])
def test_padding_of_head_dims_is_not_seen(dims, kernel):
    """The default scale is that of the given size, the output has no column more, and what lies
    between two heads of a fused tensor is neither read nor written."""
    q, k, v = qkv((100, 130), (2, 2), dims)
    out, lse = run(q, k, v)
    assert out.shape == (1, 2, 100, dims[1]) and out.is_contiguous()
    exact, exact_lse = oracle.attention_oracle(q, k, v, token_masks.dense_tokens(100, 130))
    assert relative_error(out, exact) < 0.06 and (lse - exact_lse).abs().max() < 0.06
