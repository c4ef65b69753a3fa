"""`video-attn bench-kernels`: figures, verdicts, captures, wrong options, kernels that fail."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import attention_oracle
from safetensors.torch import load_file
from token_masks import causal_tokens, dense_tokens
from torch import Tensor

from video_attn import cli
from video_attn.attention_types import ATTENTION_TYPES
from video_attn.backends import triton
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import save_capture
from video_attn.tools.kernel_bench import compare, kernels, measure, resources
from video_attn.tools.kernel_bench.cases import Sizes, random_case

CPU = torch.device("cpu")
SMALL = ["-b", "1", "-hq", "2", "-sq", "70", "-d", "32", "--device", "cpu", "--repeats", "1"]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """fp64, from the definition."""
    tokens = (causal_tokens if is_causal else dense_tokens)(q.shape[2], k.shape[2])
    return attention_oracle(q, k, v, tokens)[0]


def bench(*words: str) -> int:
    return cli.main(["bench-kernels", *words])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_kernel_and_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GQA, other lengths and head dims: TFLOPS, bytes and intensity follow from the sizes."""
    table, picture, outputs = tmp_path / "new" / "x.csv", tmp_path / "x.png", tmp_path / "out"
    words = ["-b", "1", "-hq", "4", "-hk", "2", "-sq", "40", "-sk", "70", "-d", "32", "-dv", "16",
             "--dtype", "bf16", "--device", "cpu", "--repeats", "3", "--kernel", "all",
             "-metric", "all", "--compare_to_ref", "-print_compare_stats", "-print_vgpr",
             "--csv", str(table), "--plot", str(picture), "--output_dir", str(outputs),
             "--record", str(tmp_path / "x.json")]  # fmt: skip
    assert bench(*words) == 0
    rows = rows_of(table)
    assert [row["kernel"] for row in rows] == list(ATTENTION_TYPES)
    flops = 2 * 4 * 40 * 70 * (32 + 16)
    for row in rows:
        assert row["verdict"] == "ok" and row["case"] == "1x4:2x40:70x32:16"
        assert float(row["flops"]) == flops
        seconds = float(row["total_median_ms"]) / 1e3
        assert float(row["tflops"]) == pytest.approx(flops / seconds / 1e12, rel=1e-4)
        nbytes = 2 * (4 * 40 * 32 + 2 * 70 * 32 + 2 * 70 * 16 + 4 * 40 * 16)
        nbytes += 4 * 4 * 40 if row["kernel"] in ("fav2", "fav3") else 0  # the lse
        assert int(row["bytes"]) == nbytes
        assert float(row["flop_per_byte"]) == pytest.approx(flops / nbytes, rel=1e-4)
        assert float(row["gb_per_s"]) == pytest.approx(nbytes / seconds / 1e9, rel=1e-4)
        assert float(row["total_p20_ms"]) <= float(row["total_median_ms"])
        assert row["samples"] == "3" and row["device"] and row["commit"] and row["version_torch"]
    record = json.loads((tmp_path / "x.json").read_text())
    assert [x["provider"].split()[0] for x in record["results"]] == list(ATTENTION_TYPES)
    assert all(x["metrics"]["relative_l2"] < 0.1 for x in record["results"])
    assert picture.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "worst row" in text and "no GPU kernel of ours ran" in text and "std" in text
    q, k, v = random_case(Sizes(1, 4, 2, 40, 70, 32, 16), torch.bfloat16, False).make(CPU)
    expected = exact_attention(q, k, v)
    saved = load_file(outputs / "fav2_1x4-2x40-70x32-16.safetensors")["out"]
    assert (saved - expected).norm() < 0.01 * expected.norm()


def test_causal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the pairs are counted, which is said; the mask is aligned at the end."""
    table = tmp_path / "x.csv"
    words = [*SMALL, "-sk", "90", "-causal", "--kernel", "sdpa,fav2,fav3_fp8", "-ref", "torch"]
    assert bench(*words, "--csv", str(table)) == 0
    for row in rows_of(table):
        assert float(row["flops"]) == 2 * 2 * 70 * 90 * 64 / 2
        assert row["verdict"] == "ok" and row["causal"] == "True"
    assert "half of all pairs" in capsys.readouterr().out


# -- verdicts -------------------------------------------------------------------------------------


@pytest.fixture
def case() -> tuple[Any, Any]:
    case = random_case(Sizes(1, 2, 1, 50, 3000, 16, 24), torch.float32, False)
    return case, case.make(CPU)


def test_statistics_against_the_definition(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows and of keys, causal and not; rows of few; fp64 says what is right."""
    monkeypatch.setattr(compare, "_SCORES", 7 * 3000)
    monkeypatch.setattr(compare, "_KEYS", 1024)
    for is_causal in (False, True):
        problem, qkv = random_case(case[0].sizes, torch.float32, is_causal), case[1]
        exact = exact_attention(*qkv, is_causal)
        assert compare.compare(exact, problem, qkv).relative_l2 < 1e-5
        off = exact.clone()
        off[0, 1, 49] *= 1.5
        found = compare.compare(off, problem, qkv)
        error = off - exact
        assert found.relative_l2 == pytest.approx(float(error.norm() / exact.norm()), rel=1e-3)
        assert found.max_error == pytest.approx(float(error.abs().max()), rel=1e-3)
        assert found.mean_error == pytest.approx(float(error.abs().mean()), rel=1e-2)
        cosine = (off * exact).sum() / off.norm() / exact.norm()
        assert found.cosine == pytest.approx(float(cosine), abs=1e-7)
        few = compare.compare(off, problem, qkv, rows=2)  # the first and the last of each head
        assert few.count == 2 * 2 * 24 and few.relative_l2 > found.relative_l2


@pytest.mark.parametrize("spoil", [
    lambda x: torch.zeros_like(x), lambda x: -x, lambda x: x * 1.5,
    lambda x: torch.full_like(x, torch.nan), lambda x: x.roll(1, 2),
    lambda x: x.index_fill(2, torch.tensor([17]), 0.0),
    lambda x: x.index_fill(2, torch.tensor([49]), torch.nan),
], ids=["zeros", "sign", "size", "nan", "shifted", "zero row", "nan row"])  # fmt: skip
@pytest.mark.parametrize("precision", compare.BOUNDS)
def test_wrong_outputs_are_seen(case: tuple, spoil: Any, precision: str) -> None:
    problem, qkv = case
    exact = exact_attention(*qkv)
    bound = compare.BOUNDS[precision]
    assert bound.broken_by(compare.compare(exact, problem, qkv)) == ""
    assert bound.broken_by(compare.compare(spoil(exact), problem, qkv)) != ""
    assert bound.plus(compare.BOUNDS["fp8"]).broken_by(
        compare.compare(spoil(exact), problem, qkv, reference=exact)
    )


def test_a_wrong_kernel_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Statistics are shown all the same, and the other kernels have their rows."""
    right = kernels.named_attention

    def wrong(q: Any, k: Any, v: Any, name: str, **options: Any) -> Any:
        out = right(q, k, v, name, **options)
        return out * 0 if name == "fav2" else out

    monkeypatch.setattr(kernels, "named_attention", wrong)
    table = tmp_path / "x.csv"
    words = [*SMALL, "--kernel", "fav2,sagev1", "--compare_to_ref", "--csv", str(table)]
    assert bench(*words) == 1
    text = capsys.readouterr().out
    assert "FAILED: 1x2x70x32 fav2: relative L2 1.00e+00 > " in text
    assert [row["verdict"][:2] for row in rows_of(table)] == ["re", "ok"]


def test_a_kernel_that_cannot_run_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "hopper")
    table = tmp_path / "x.csv"
    assert bench(*SMALL, "--kernel", "sdpa,fav3", "--csv", str(table), "-print_vgpr") == 1
    assert "FAILED: 1x2x70x32 fav3: " in capsys.readouterr().out
    sdpa, fav3 = rows_of(table)
    assert sdpa["error"] == "" and sdpa["tflops"]
    assert "hopper" in fav3["error"] and fav3["tflops"] == ""


def test_a_reference_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "hopper")
    assert bench(*SMALL, "--kernel", "sdpa", "-ref", "fav3") == 1
    text = capsys.readouterr().out
    assert "the reference fav3 cannot run: " in text and "TFLOPS" in text


def test_inputs_that_do_not_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next case has its rows all the same."""
    right = torch.randn

    def small(shape: tuple[int, ...], **options: Any) -> Tensor:
        if shape[2] > 100:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return right(shape, **options)

    monkeypatch.setattr(torch, "randn", small)
    words = ["--shapes", "1x1x101x8", "1x1x64x8", "--kernel", "sdpa", "--device", "cpu"]
    assert bench(*words, "--repeats", "1") == 1
    text = capsys.readouterr().out
    assert "FAILED: 1x1x101x8 sdpa: tried to allocate" in text
    assert "FAILED: 1x1x64x8" not in text


@pytest.mark.parametrize("reference", ["fav2", "qk_int8", "fav3_fp8"])
def test_references(reference: str) -> None:
    assert bench(*SMALL, "-fav3_sage", "--compare_to_ref", "-ref", reference) == 0


# -- captures -------------------------------------------------------------------------------------


def save(folder: Path, number: int, **facts: Any) -> None:
    generator = torch.Generator().manual_seed(number)
    shape = (1, 40, 2, 16) if facts.get("layout") == "bshd" else (1, 2, 40, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    path = folder / f"sagev1_input_{number:06d}.pt"
    save_capture(Capture(q, k, v, Facts(call_idx=number, **facts)), path)


def test_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their own layout, scale and mask; some of them only."""
    folder = tmp_path / "captured_inputs"
    folder.mkdir()
    save(folder, 0, layer=3, step=2)
    save(folder, 1, layout="bshd", scale=0.7)
    save(folder, 2, is_causal=True)
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(kernels, "named_attention", spy(kernels.named_attention, seen))
    words = ["--load_captured", "-qk_int8", "--compare_to_ref", "-o", "--repeats", "1"]
    assert bench(*words, "--device", "cpu") == 0
    rows = rows_of(tmp_path / "bench_diffusion_attention_captured_sagev1.csv")
    assert [row["file"] for row in rows] == [f"sagev1_input_00000{n}.pt" for n in range(3)]
    assert [row["verdict"] for row in rows] == ["ok"] * 3
    assert {(row["hq"], row["sq"], row["d"]) for row in rows} == {("2", "40", "16")}
    assert (rows[0]["layer"], rows[0]["step"], rows[1]["layer"]) == ("3", "2", "")
    assert set(seen) == {(None, False), (0.7, False), (None, True)}
    assert bench(*words, "--device", "cpu", "--sample_rate", "2", "--max_inputs", "1") == 0
    assert len(rows_of(tmp_path / "bench_diffusion_attention_captured_sagev1.csv")) == 1


def spy(call: Any, seen: list) -> Any:
    def noted(*args: Any, **options: Any) -> Any:
        seen.append((options["scale"], options["is_causal"]))
        return call(*args, **options)

    return noted


# -- wrong options --------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "named"), [
    ([], "-b, -hq, -sq, -d is missing"),
    (["-b", "1", "-hq", "2", "-d", "8"], "-sq is missing"),
    ([*SMALL, "-fp8", "-qk_int8"], "--kernel fav3_fp8,sagev1"),
    ([*SMALL, "-fp8", "--kernel", "sdpa"], "not both"),
    ([*SMALL, "--kernel", "fav9"], "fav9"),
    ([*SMALL, "-hk", "3"], "-hq 2 must be a multiple of -hk 3"),
    ([*SMALL, "-no_k_smooth"], "quantizes nothing"),
    ([*SMALL, "--shapes", "1x2x3x4"], "not both"),
    ([*SMALL, "--device", "tpu"], "tpu"),
    ([*SMALL, "--device", "cuda:9"], "cuda:9"),
    ([*SMALL, "--captured_dir", "x"], "--load_captured"),
    (["--load_captured", "-sq", "5"], "-sq"),
    (["--load_captured", "--dtype", "bf16"], "--dtype"),
    (["--load_captured", "--captured_dir", "absent"], "absent"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_options_that_do_not_fit(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["-ref", "fav4"], ["-metric", "speed"], ["-b", "0"], ["--dtype", "fp8"], ["-fp9"],
    ["--shapes", "1x2x3"], ["--plot", "x.csv"],
])  # fmt: skip
def test_options_that_do_not_exist(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(*SMALL, *words)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["1x2x300x64", "2x3x517x128"])
def test_every_kernel_on_a_gpu(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpu: torch.device
) -> None:
    """All right; quantization and attention apart where they are two steps; registers known."""
    table = tmp_path / "x.csv"
    words = ["--shapes", size, "--device", "cuda", "--kernel", "all", "-metric", "all", "-ref",
             "torch", "-print_vgpr", "--csv", str(table)]  # fmt: skip
    assert bench(*words) == 0
    for row in rows_of(table):
        assert row["verdict"] == "ok" and float(row["tflops"]) > 0
        if row["backend"] in ("cuda_sage", "triton") and row["precision"] != "native":
            assert float(row["kernel_median_ms"]) > 0 and float(row["quantize_median_ms"]) > 0
    assert "registers of the compiled kernels" in capsys.readouterr().out


# -- parts and resources --------------------------------------------------------------------------


@pytest.mark.skipif(not triton._interpreting(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["sagev1", "fav3_sage", "fav3_fp8"])
def test_the_parts_of_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantization and attention apart give what the whole gives; codes and scales are counted."""
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "triton")
    case = random_case(Sizes(1, 1, 1, 20, 30, 16, 16), torch.float16, False)
    kernel = kernels.prepare(name, case, case.make(CPU), smooth_k=True)
    assert kernel.backend == "triton" and kernel.quantize is not None
    codes = sum(x.numel() for x in kernel.tensors if x.element_size() == 1)
    assert codes >= 20 * 16 + 30 * 16
    timings = measure._time({name: kernel}, measure.Settings([name], CPU, repeats=1))
    assert set(timings[name]) == {"total", "quantize", "kernel"}


def test_resources_of_triton_kernels() -> None:
    """Both vendors, from what Triton keeps of a compiled kernel."""
    metadata = SimpleNamespace(num_warps=4, num_stages=2, shared=65_536)
    nvidia = SimpleNamespace(metadata=metadata, asm={"ptx": ""}, n_regs=255, n_spills=8)
    assert resources.usage_of("k", nvidia) == ("k", "4 warps, 2 stages", 255, "8", 65_536)
    text = ".vgpr_count:     112\n  .vgpr_spill_count: 3\n"
    amd = SimpleNamespace(metadata=metadata, asm={"amdgcn": text})
    assert resources.usage_of("k", amd) == ("k", "4 warps, 2 stages", 112, "3", 65_536)


def test_resources_of_libraries() -> None:
    text = (
        "Fatbin elf code:\n================\narch = sm_80\ncode version = [1,7]\n"
        " Function _ZN4sage16attention_kernelILi64EEEvv:\n"
        "  REG:99 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400\n"
        "Fatbin elf code:\n================\narch = sm_90a\n"
        " Function _ZN4sage16attention_kernelILi128EEEvv:\n"
        "  REG:168 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:400\n"
    )
    [usage] = resources.parse_usage(text, "sm_90")
    assert usage[2:] == (168, "24 bytes", 1024) and "attention_kernel" in usage.kernel


def test_no_figure_is_nan() -> None:
    """A reference of zeros has a relative error all the same."""
    found = compare.Statistics()
    found.add(torch.zeros(3, 4), torch.zeros(3, 4))
    assert not any(math.isnan(x) for x in found.as_dict().values())
    assert found.worst_row == 1 and found.relative_l2 == 0
