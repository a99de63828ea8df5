"""Recipes of the Open-Sora 2.0 report (arXiv 2503.09642v3, "OS2") and its repository (hpcaitech/Open-Sora at 7ad6a96, "repo").

Where both disagree the released weights follow the repository, and so do these. A step is a token budget here: the published batch sizes
per GPU times the published GPUs, counted in tokens (text and video) of full 129-frame clips.
"""

from __future__ import annotations

from dataclasses import replace

from megasora.config.schema import (
    CheckpointConfig,
    ConditionConfig,
    DataConfig,
    EncodersConfig,
    FlowConfig,
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
CONDITIONS = ConditionConfig(t2v=1.0, i2v_head=5.0, i2v_loop=1.0, i2v_tail=1.0)
"""repo configs/diffusion/train/stage1_i2v.py: condition_config."""


def opensora2_image() -> RunConfig:
    """256px images, the warm start between FLUX and video. repo configs/diffusion/train/image.py."""
    return RunConfig(
        recipe="opensora2_image",
        # repo image.py: grad_ckpt_settings = (8, 100), the first 8 double blocks and every single one; kept whole, the other 11 would take
        # 51 GB beside 72 GB of state and 10 GB of block inputs, too near to the GPU's 141 (`megasora validate`), so they are selective
        parallel=ParallelConfig(recompute="selective", recompute_double_blocks=8, recompute_single_blocks=38),
        data=DataConfig(
            # OS2 section 4: 45 images of 256px per GPU; 224 GPUs as in stage 1 (table 2)
            global_tokens=45 * 224 * TOKENS_256PX_IMAGE,
            frame_counts=(1,),
        ),
        # repo image.py: lr 1e-5 for the image warm start
        optimizer=OptimizerConfig(lr=1e-5),
        sample=SampleConfig(num_frames=1),
        train=TrainConfig(steps=10_000),
    )


def opensora2_stage1() -> RunConfig:
    """256px text-to-video. OS2 table 2: 70 M clips, CP 1, 85 k steps, 224 GPUs, 2,240 GPU-days."""
    return RunConfig(
        recipe="opensora2_stage1",
        # DP 224 without model parallelism would hold 72 GB of state (facts: DP224); recompute keeps 129-frame activations small
        parallel=ParallelConfig(recompute="full"),
        data=DataConfig(
            # 3 clips of 129 frames per GPU x 224 GPUs (OS2 section 4)
            global_tokens=3 * 224 * TOKENS_256PX_129F,
        ),
        # OS2 section 4.2: 5e-5, after 40 k steps 3e-5
        optimizer=OptimizerConfig(lr=5e-5, lr_milestones=((40_000, 3e-5),)),
        checkpoint=CheckpointConfig(interval_steps=500),
        train=TrainConfig(steps=85_000),
    )


def opensora2_stage2() -> RunConfig:
    """256px text- and image-to-video. OS2 table 2: 10 M clips, CP 1, 13 k steps, 192 GPUs, 384 GPU-days."""
    stage1 = opensora2_stage1()
    return replace(
        stage1,
        recipe="opensora2_stage2",
        data=replace(stage1.data, global_tokens=3 * 192 * TOKENS_256PX_129F),
        condition=CONDITIONS,
        # stage 2 continues at stage 1's last rate (OS2 section 4.2)
        optimizer=OptimizerConfig(lr=3e-5),
        train=TrainConfig(steps=13_000),
    )


def opensora2_stage3() -> RunConfig:
    """768px text- and image-to-video. OS2 table 2: 5 M clips, CP 4, 13 k steps, 192 GPUs, 1,536 GPU-days."""
    stage2 = opensora2_stage2()
    return replace(
        stage2,
        recipe="opensora2_stage3",
        parallel=replace(stage2.parallel, context_parallel_size=4),
        data=replace(
            stage2.data,
            resolution="768px",
            # 2 clips of 129 frames per group of 4 GPUs, 48 groups (OS2 section 4: batch 2 with CP 4)
            global_tokens=2 * 48 * TOKENS_768PX_129F,
        ),
        # OS2 section 4.2: 1e-5
        optimizer=OptimizerConfig(lr=1e-5),
        sample=replace(stage2.sample, height=768, width=768),
        train=TrainConfig(steps=13_000),
    )


def opensora2_dc_ae() -> RunConfig:
    """768px with the 4x32x32 autoencoder (128 channels, patch 1). repo configs/diffusion/train/high_compression.py.

    It validates and counts; `train` refuses it, because the video DC-AE itself is not part of this version.
    """
    return RunConfig(
        recipe="opensora2_dc_ae",
        model=ModelConfig(in_channels=128, patch_size=1),
        parallel=ParallelConfig(recompute="full"),
        # 128 frames of 768px are 32 x 24 x 24 + 512 = 18,944 tokens (OS2 section 5); the DC-AE takes multiples of 4 frames
        data=DataConfig(resolution="768px", global_tokens=3 * 192 * 18_944, frame_counts=(129, 97, 65, 33, 1)),
        condition=CONDITIONS,
        flow=FlowConfig(),
        encoders=EncodersConfig(spatial_compression=32),
        optimizer=OptimizerConfig(lr=3e-5),
        sample=SampleConfig(height=768, width=768),
        train=TrainConfig(steps=13_000),
    )
