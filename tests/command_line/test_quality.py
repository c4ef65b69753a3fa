"""`video-attn quality`: PSNR and SSIM by their definitions, videos that do not fit, LPIPS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch

from video_attn import cli
from video_attn.tools.quality import measures
from video_attn.tools.video import Clip, write_clip

SIZE, FRAMES = (40, 48), 11


def clip(seed: int, noise: float = 0.0, frames: int = FRAMES, size: tuple = SIZE) -> Clip:
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(frames, 5, 6, 3)).repeat(size[0] // 5, 1).repeat(size[1] // 6, 2)
    own = np.random.default_rng(seed).normal(size=smooth.shape)
    return (128 + 40 * smooth + noise * own).clip(0, 255).astype(np.uint8)


def frames_of(path: Path) -> Clip:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def ssim_of(a: Clip, b: Clip) -> float:
    """The definition of 2004 on one frame: a Gaussian window, everywhere it lies inside."""
    x = np.arange(11) - 5
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for c in range(3):
        p, q = (np.lib.stride_tricks.sliding_window_view(z[..., c] / 255, (11, 11)) for z in (a, b))
        mean = [(z * window).sum((2, 3)) for z in (p, q)]
        var = [(z * z * window).sum((2, 3)) - m**2 for z, m in zip((p, q), mean, strict=True)]
        cov = (p * q * window).sum((2, 3)) - mean[0] * mean[1]
        top = (2 * mean[0] * mean[1] + 0.01**2) * (2 * cov + 0.03**2)
        values.append(
            (top / ((mean[0] ** 2 + mean[1] ** 2 + 0.01**2) * (sum(var) + 0.03**2))).mean()
        )
    return float(np.mean(values))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    made = {"a": clip(1), "b": clip(2, 12.0), "c": clip(3, 60.0),
            "short": clip(1, frames=5), "wide": clip(1, size=(40, 60)),
            "small": clip(1, size=(10, 12))}  # fmt: skip
    for name, frames in made.items():
        write_clip(folder / f"{name}.mp4", frames, 8)
    return {name: folder / f"{name}.mp4" for name in made}


def test_by_their_definitions(videos, tmp_path, capsys):
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    words = [
        "quality",
        *(str(videos[n]) for n in "abc"),
        "--json",
        str(out),
        "--plot",
        str(picture),
    ]
    assert cli.main([*words, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"{FRAMES} frames against a.mp4" in text and "no LPIPS" in text
    found = json.loads(out.read_text())["videos"]
    first = frames_of(videos["a"])
    for name, one in zip("bc", found, strict=True):
        other = frames_of(videos[name])
        squares = ((first.astype(float) - other) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(one["psnr_db"], 10 * np.log10(255**2 / squares), rtol=1e-5)
        assert one["psnr_db_of_all"] == pytest.approx(10 * np.log10(255**2 / squares.mean()))
        for number in (0, FRAMES - 1):
            inside = ssim_of(first[number], other[number])
            assert one["ssim"][number] == pytest.approx(inside, abs=1e-4)
    assert found[0]["psnr_db_of_all"] > found[1]["psnr_db_of_all"] + 5
    assert picture.stat().st_size > 10_000


def test_a_reference_and_equal_videos(videos, tmp_path, capsys):
    out = tmp_path / "q.json"
    words = ["quality", str(videos["a"]), "--ref", str(videos["a"]), "--json", str(out)]
    assert cli.main([*words, "--device", "cpu", "--plot", str(tmp_path / "q.png")]) == 0
    assert "equal" in capsys.readouterr().out
    [one] = json.loads(out.read_text())["videos"]
    assert one["psnr_db"] == [None] * FRAMES and one["psnr_db_of_all"] is None
    assert one["ssim"] == pytest.approx([1.0] * FRAMES, abs=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "there must be two videos"),
        (["a", "short"], "has 5 frames, but"),
        (["a", "wide"], "has 60 x 40 pixels, but"),
        (["small", "small"], "SSIM needs 11 pixels"),
        (["a", "none"], "cannot be read as a video"),
    ],
)
def test_videos_that_do_not_fit(videos, tmp_path, capsys, names, message):
    paths = [str(videos.get(name, tmp_path / "none.mp4")) for name in names]
    assert cli.main(["quality", *paths, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_lpips_where_its_weights_are(videos, tmp_path, monkeypatch, capsys):
    """Never downloaded: without the file the reason is said; with it every frame has its value."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    real = measures.importlib.util.find_spec
    monkeypatch.setattr(
        measures.importlib.util, "find_spec", lambda name: name == "torchvision" or real(name)
    )
    words = ["quality", str(videos["a"]), str(videos["b"]), "--device", "cpu"]
    assert cli.main(words) == 0
    assert "its weights are not there: " in capsys.readouterr().out

    class Metric(torch.nn.Module):
        def __init__(self, net: str, normalize: bool) -> None:
            super().__init__()
            assert net == "alex" and normalize

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == (1, 3, *SIZE) and a.min() >= 0 and a.max() <= 1
            return (a - b).abs().mean()

        def reset(self) -> None: ...

    image = ModuleType("torchmetrics.image")
    image.LearnedPerceptualImagePatchSimilarity = Metric
    monkeypatch.setitem(sys.modules, "torchmetrics.image", image)
    weights = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir()
    weights.touch()
    out = tmp_path / "q.json"
    assert cli.main([*words, "--json", str(out), "--plot", str(tmp_path / "q.png")]) == 0
    [one] = json.loads(out.read_text())["videos"]
    a, b = (frames_of(videos[n]).astype(float) / 255 for n in "ab")
    np.testing.assert_allclose(one["lpips"], np.abs(a - b).mean((1, 2, 3)), rtol=1e-5)
