"""Recipes of the Open-Sora 2.0 report (arXiv 2503.09642v3, "OS2") and its repository (hpcaitech/Open-Sora at 7ad6a96, "repo").

Where both disagree the released weights follow the repository, and so do these, but for the learning rates of stages 2 and 3: the report
says how the stages followed each other, the repository's files hold one rate each to start from. What the other says stands beside each
number; tests/published/recipes.csv lists them all.

A step is a token budget here: the published batch sizes per GPU times the published GPUs, counted in tokens (text and video) of full
129-frame clips. The published run shards gradients too (plugin zero2, hybrid with zero_stage 2); ours leaves that to parallel.zero_stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megasora.config.schema import (
    CheckpointConfig,
    ConditionConfig,
    DataConfig,
    EncodersConfig,
    InitConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

TOKENS_256PX_129F = 8_960
"""33 x 16 x 16 video tokens + 512 text tokens of a square clip (OS2 section 3)."""
TOKENS_768PX_129F = 76_544
"""33 x 48 x 48 + 512."""
TOKENS_256PX_IMAGE = 768
"""16 x 16 + 512."""
TOKENS_768PX_128F_DC_AE = 18_944
"""32 x 24 x 24 + 512."""
CLIP_FRAMES = tuple(range(129, 4, -4))
"""129, 125, ..., 5: every 4k + 1 (repo stage1.py, bucket_config)."""
DC_AE_FRAMES = tuple(range(128, 15, -4))
"""128, 124, ..., 16 (repo high_compression.py, bucket_config)."""
CONDITIONS = ConditionConfig(t2v=1.0, i2v_head=5.0, i2v_loop=1.0, i2v_tail=1.0)
"""repo configs/diffusion/train/stage1_i2v.py and stage2_i2v.py: condition_config."""
KEPT = 20
"""repo image.py: keep_n_latest. Checkpoints of ours are 167 GB each (weights, master weights, Adam's moments)."""
Mix = tuple[tuple[str, int, float, float], ...]


def _mix(resolution: str, frames: Sequence[int], probability: float) -> Mix:
    """Entries of data.bucket_mix; no published entry has a probability of moving on."""
    return tuple((resolution, count, probability, 0.0) for count in frames)


def _optimizer(lr: float, milestones: tuple[tuple[int, float], ...] = ()) -> OptimizerConfig:
    """repo image.py: HybridAdam, eps 1e-15, no weight decay, gradients clipped at 1, no warm-up, ema_decay None."""
    return OptimizerConfig(lr=lr, lr_milestones=milestones, eps=1e-15, weight_decay=0.0, clip_grad=1.0, warmup_steps=0, ema_decay=0.0)


def _data(mix: Mix, *, global_tokens: int) -> DataConfig:
    """repo image.py: fps_max 24, dropout_ratio 0.31622777 each, prefetch_factor 2, num_workers 12."""
    return DataConfig(
        resolution="mix",
        buckets="published",
        bucket_mix=mix,
        frame_counts=tuple(sorted({frames for _, frames, _, _ in mix}, reverse=True)),
        target_fps=24.0,
        temporal_start="random",
        global_tokens=global_tokens,
        dropout_t5=0.31622777,
        dropout_clip=0.31622777,
        prefetch_steps=2,
        decode_workers=12,
    )


def opensora2_image() -> RunConfig:
    """256px images, the warm start between FLUX and video. repo configs/diffusion/train/image.py."""
    return RunConfig(
        recipe="opensora2_image",
        # repo image.py: no cond_embed; FLUX has none either
        model=ModelConfig(cond_embed=False),
        # repo image.py: grad_ckpt_settings = (8, 100), the first 8 double blocks and every single one; with the other 11 kept whole a
        # GPU would need 152 GB and has 141 (`megasora validate`), so they are selective, which gives the same numbers
        parallel=ParallelConfig(recompute="selective", recompute_double_blocks=8, recompute_single_blocks=38),
        data=_data(
            # repo image.py: bucket_config; the classes are tried by descending pixels
            _mix("1024px", (1,), 0.5) + _mix("768px", (1,), 0.5) + _mix("256px", (1,), 1.0),
            # repo image.py: 50 images of 256px per GPU (11 of 768px, 7 of 1024px); OS2 section 4 and repo stage1.py: 45. 224 GPUs as in
            # stage 1 (table 2)
            global_tokens=50 * 224 * TOKENS_256PX_IMAGE,
        ),
        encoders=EncodersConfig(posterior="sample"),
        # repo image.py: lr 1e-5
        optimizer=_optimizer(1e-5),
        checkpoint=CheckpointConfig(interval_steps=100, keep=KEPT),
        sample=SampleConfig(num_frames=1),
        # unpublished; chosen
        train=TrainConfig(steps=10_000),
    )


def opensora2_stage1() -> RunConfig:
    """256px text-to-video. OS2 table 2: 70 M clips, CP 1, 85 k steps, 224 GPUs, 2,240 GPU-days. repo stage1.py."""
    return RunConfig(
        recipe="opensora2_stage1",
        # repo stage1.py: no cond_embed; stage 2 adds cond_in, which starts at zero
        model=ModelConfig(cond_embed=False),
        # repo stage1.py: grad_ckpt_settings = (8, 100); with the other 11 double blocks kept whole a GPU would need 124 GB and
        # encoders beside them, which is too near to its 141
        parallel=ParallelConfig(recompute="selective", recompute_double_blocks=8, recompute_single_blocks=38),
        data=_data(
            # repo stage1.py: bucket_config
            _mix("1024px", (1,), 0.5) + _mix("768px", (1,), 0.5) + _mix("256px", (*CLIP_FRAMES, 1), 1.0),
            # 3 clips of 129 frames per GPU (4 of 97, 6 of 65, 12 of 33, 45 images of 256px, 13 of 768px, 7 of 1024px) x 224 GPUs
            # (OS2 section 4, repo stage1.py)
            global_tokens=3 * 224 * TOKENS_256PX_129F,
        ),
        encoders=EncodersConfig(posterior="sample"),
        # OS2 section 4.2: 5e-5, after 40 k steps 3e-5; repo stage1.py: 5e-5
        optimizer=_optimizer(5e-5, ((40_000, 3e-5),)),
        # repo stage1.py: ckpt_every 2000
        checkpoint=CheckpointConfig(interval_steps=2000, keep=KEPT),
        init=InitConfig(follows="opensora2_image"),
        train=TrainConfig(steps=85_000),
    )


def opensora2_stage2() -> RunConfig:
    """256px text- and image-to-video. OS2 table 2: 10 M clips, CP 1, 13 k steps, 192 GPUs, 384 GPU-days. repo stage1_i2v.py."""
    stage1 = opensora2_stage1()
    return replace(
        stage1,
        recipe="opensora2_stage2",
        # repo stage1_i2v.py: cond_embed
        model=replace(stage1.model, cond_embed=True),
        data=replace(stage1.data, global_tokens=3 * 192 * TOKENS_256PX_129F),
        condition=CONDITIONS,
        # stage 2 continues at stage 1's last rate (OS2 section 4.2); repo stage1_i2v.py: 1e-5
        optimizer=_optimizer(3e-5),
        init=InitConfig(follows="opensora2_stage1"),
        train=TrainConfig(steps=13_000),
    )


def opensora2_stage3() -> RunConfig:
    """768px text- and image-to-video. OS2 table 2: 5 M clips, CP 4, 13 k steps, 192 GPUs, 1,536 GPU-days. repo stage2_i2v.py."""
    stage2 = opensora2_stage2()
    return replace(
        stage2,
        recipe="opensora2_stage3",
        # repo stage2.py: sp_size 4 (ring_attn; ours takes Ulysses where the heads divide, the same numbers), grad_ckpt_settings (100, 100)
        parallel=ParallelConfig(context_parallel_size=4, recompute="full"),
        data=_data(
            # repo stage2_i2v.py: bucket_config
            _mix("768px", (*CLIP_FRAMES, 1), 0.5) + _mix("256px", (*CLIP_FRAMES, 1), 1.0),
            # 2 clips of 129 frames per group of 4 GPUs, 48 groups. 768px, 97, 65 and 33 frames and images: 3, 4, 6 and 38 (OS2 section 4,
            # repo stage2.py), 3, 5, 10 and 38 in repo stage2_i2v.py, which has 23, 28, 40, 80 and 195 of 256px
            global_tokens=2 * 48 * TOKENS_768PX_129F,
        ),
        # OS2 section 4.2: 1e-5; repo stage2.py: 5e-5
        optimizer=_optimizer(1e-5),
        # repo stage2.py: ckpt_every 200
        checkpoint=CheckpointConfig(interval_steps=200, keep=KEPT),
        sample=replace(stage2.sample, height=768, width=768),
        init=InitConfig(follows="opensora2_stage2"),
        train=TrainConfig(steps=13_000),
    )


def opensora2_dc_ae() -> RunConfig:
    """768px with the 4x32x32 autoencoder (128 channels, patch 1). repo configs/diffusion/train/high_compression.py.

    --encoders.vae takes the folder that `megasora convert F32T4C128_AE.safetensors FOLDER --to dc-ae` makes. The report starts from a 768px
    model of the 4x8x8 autoencoder with new input and output layers, which --init.run or --init.weights of such a model does here
    (init.ends); the repository from nothing (from_pretrained None).
    """
    return RunConfig(
        recipe="opensora2_dc_ae",
        model=ModelConfig(in_channels=128, patch_size=1),
        # repo high_compression.py: grad_ckpt_settings (100, 100)
        parallel=ParallelConfig(recompute="full"),
        data=_data(
            # repo high_compression.py: bucket_config; multiples of 4, which is what the DC-AE takes (OS2 section 5 says "33 frames", which
            # it refuses; 32 here)
            _mix("768px", (*DC_AE_FRAMES, 1), 1.0),
            # 2 clips of 128 frames per GPU (3 of 96, 4 of 64, 8 of 32, 20 images) on 160 GPUs (OS2 section 5)
            global_tokens=2 * 160 * TOKENS_768PX_128F_DC_AE,
        ),
        # repo high_compression.py: condition_config
        condition=ConditionConfig(t2v=1.0, i2v_head=7.0),
        # repo high_compression.py: is_causal_vae False, ae_spatial_compression 32; its posterior has no spread to sample from. Tiles and
        # windows as opensora/models/dc_ae has them by default (spatial_tile_size 256, temporal_tile_size 32): that is what its
        # inference takes, and what the DC-AE was trained on; training there meant to, and called the bare encoder (issue 892).
        # Latents are not scaled: repo high_compression.py says 0.493, to divide by, but its training never did, and its inference does not
        encoders=EncodersConfig(spatial_compression=32, causal=False, tile_frames=32),
        init=InitConfig(ends="new_if_other"),
        # repo high_compression.py: lr 3e-5
        optimizer=_optimizer(3e-5),
        # repo high_compression.py: ckpt_every 250
        checkpoint=CheckpointConfig(interval_steps=250, keep=KEPT),
        sample=SampleConfig(height=768, width=768, num_frames=128),
        # OS2 section 5: 17 k steps on clips of up to 32 frames (--data.frame_counts 32 28 24 20 16 1), then 8 k on clips of up to 128
        train=TrainConfig(steps=25_000),
    )
