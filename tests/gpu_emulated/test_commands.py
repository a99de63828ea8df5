"""`megasora forward` and `megasora data encode` with `--device cuda`, on emulated GPUs, against the same commands on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from megasora import recipes
from megasora.config.schema import RunConfig
from megasora.data.cache.shards import MEMBERS, shard_name
from megasora.data.manifest import read_manifest
from megasora.data.tiny_clips import make_tiny_clips
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.training.encode.run import run_encode
from megasora.training.encode.settings import EncodeSettings
from tests.gpu_emulated.layouts import gap
from tests.gpu_emulated.runs import encode_on_gpu, forward_on_gpu
from tests.parallel.test_against_diffusers import AXES, batch, flux, run_on_rank
from tests.parallel.test_cached_feed import encode_on_rank
from tests.pool import RankPool

FP32 = 1e-5
"""||a - b|| / ||b|| of an fp32 forward and its gradients, whose sums are ordered differently (rounding gives about 1e-6)."""
TP2_PP2_CP2 = {"tp": 2, "pp": 2, "cp": 2}


# --- forward ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forward_folder(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FLUX and inputs, with the CPU's predictions and gradients: cpu_fp32, cpu_bf16."""
    folder = tmp_path_factory.mktemp("forward")
    save_file({name: tensor.contiguous() for name, tensor in flux(False).state_dict().items()}, folder / "weights.safetensors")
    save_file(batch(False), folder / "inputs.safetensors")
    for dtype in ("fp32", "bf16"):
        pool.run(1, run_on_rank, str(folder), {"dtype": dtype})
        (folder / "out.safetensors").rename(folder / f"cpu_{dtype}.safetensors")
        (folder / "grads.safetensors").rename(folder / f"cpu_{dtype}_grads.safetensors")
    return folder


def on_gpu(gpus: RankPool, folder: Path, name: str, **layout: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(prediction, gradients) of the command on emulated GPUs."""
    world_size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    gpus.run(world_size, forward_on_gpu, folder, f"{name}.safetensors", f"{name}_grads.safetensors", AXES, layout)
    return load_file(folder / f"{name}.safetensors")["pred"], load_file(folder / f"{name}_grads.safetensors")


def on_cpu(folder: Path, dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(prediction, gradients) of the command on the CPU."""
    return load_file(folder / f"cpu_{dtype}.safetensors")["pred"], load_file(folder / f"cpu_{dtype}_grads.safetensors")


def whole(gradients: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector, by name."""
    return torch.cat([gradients[key].double().flatten() for key in sorted(gradients)])


@pytest.mark.parametrize("layout", [{}, TP2_PP2_CP2], ids=["one rank", "tp2 pp2 cp2"])
def test_forward_in_fp32_is_the_cpus(gpus: RankPool, forward_folder: Path, layout: dict[str, int]) -> None:
    prediction, gradients = on_gpu(gpus, forward_folder, "gpu_fp32", **layout)
    expected, expected_gradients = on_cpu(forward_folder, "fp32")
    assert gap(prediction, expected) < FP32
    assert gradients.keys() == expected_gradients.keys()
    assert max(gap(gradients[key], value) for key, value in expected_gradients.items()) < FP32


@pytest.mark.parametrize("layout", [{}, TP2_PP2_CP2], ids=["one rank", "tp2 pp2 cp2"])
def test_forward_in_bf16_is_as_near_to_fp32_as_the_cpus_is(gpus: RankPool, forward_folder: Path, layout: dict[str, int]) -> None:
    """Transformer Engine rounds at other places than Megatron's own layers: half as far again is allowed, as in test_layers."""
    prediction, gradients = on_gpu(gpus, forward_folder, "gpu_bf16", dtype="bf16", **layout)
    (exact, exact_gradients), (rounded, rounded_gradients) = on_cpu(forward_folder, "fp32"), on_cpu(forward_folder, "bf16")
    assert 0 < gap(prediction, exact) < 1.5 * gap(rounded, exact)
    assert gap(whole(gradients), whole(exact_gradients)) < 1.5 * gap(whole(rounded_gradients), whole(exact_gradients))


# --- data encode ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Seven tiny clips, one of them broken, and encoders."""
    folder = tmp_path_factory.mktemp("encode")
    manifest, _ = make_tiny_clips(folder / "clips", num_clips=7, num_eval=1)
    broken = folder / "clips" / "clip001.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    tiny = recipes.get("tiny")
    captions = [clip.text for clip in read_manifest(manifest).clips]
    encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=tiny.model, base=tiny.encoders)
    return replace(tiny, device="cuda", encoders=encoders, data=replace(tiny.data, manifest=str(manifest), decoder="pyav"))


def in_dtype(config: RunConfig, dtype: str, device: str) -> RunConfig:
    return replace(config, device=device, encoders=replace(config.encoders, dtype=dtype))  # type: ignore[arg-type]


def settings(folder: Path) -> EncodeSettings:
    return EncodeSettings(output=folder, samples_per_shard=3, conditions="all")


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a cache, by sample and name."""
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {
        f"{sample['__key__']}/{name}": tensor
        for sample in webdataset.WebDataset(shards, shardshuffle=False)
        for member in MEMBERS[:2]
        for name, tensor in load(sample[member]).items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_encode_gives_the_cpus_latents_and_text(gpus: RankPool, pool: RankPool, clips: RunConfig, tmp_path: Path, dtype: str) -> None:
    """The same torch operators run on the emulated device, so nothing but the place where a tensor is made could differ."""
    (result,) = gpus.run(1, encode_on_gpu, in_dtype(clips, dtype, "cuda"), settings(tmp_path / "gpu"))
    assert (result.made, result.failed, result.samples) == ((0, 1, 2), 1, 7)
    pool.run(1, encode_on_rank, in_dtype(clips, dtype, "cpu"), settings(tmp_path / "cpu"))
    ours, theirs = stored(tmp_path / "gpu"), stored(tmp_path / "cpu")
    assert ours.keys() == theirs.keys()
    assert len({key.split("/")[0] for key in ours}) == 6
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


def test_an_interrupted_encode_goes_on_where_it_stopped(gpus: RankPool, clips: RunConfig, tmp_path: Path) -> None:
    gpus.run(1, encode_on_gpu, clips, settings(tmp_path / "straight"))
    assert gpus.run(1, encode_on_gpu, clips, settings(tmp_path / "again"), 5) == [None]
    assert [path.name for path in sorted((tmp_path / "again").glob("*.tar"))] == [f"{shard_name(0)}.tar"]
    (result,) = gpus.run(1, encode_on_gpu, clips, settings(tmp_path / "again"))
    assert (result.kept, result.made) == ((0,), (1, 2))
    assert contents(tmp_path / "again") == contents(tmp_path / "straight")


def test_a_cache_that_the_cpu_began_is_not_gone_on_with_by_other_numbers(clips: RunConfig, gpus: RankPool, tmp_path: Path) -> None:
    """bf16 and fp32 latents never share a cache, whatever device encodes."""
    from tests.pool import RankFailedError

    run_encode(in_dtype(clips, "fp32", "cpu"), replace(settings(tmp_path), store="text"))
    with pytest.raises(RankFailedError, match="dtype"):
        gpus.run(1, encode_on_gpu, in_dtype(clips, "bf16", "cuda"), replace(settings(tmp_path), store="text"))
