"""Recipes of `megasora train-ae`.

"P3" is arXiv 2503.09642v3 section 4.4, "repo" hpcaitech/Open-Sora configs/vae/train and opensora/models/vae (at 7ad6a96), "history" the
same repository's public commit c4f981b, which still has the configs removed at release.

Where P3 and repo disagree the released DC-AE followed repo (its run's name and settings), and so do these; the other number stands beside.
"""

from __future__ import annotations

from dataclasses import replace

from megasora.config.autoencoder_run import (
    AutoencoderConfig,
    AutoencoderDataConfig,
    AutoencoderEvalConfig,
    AutoencoderInitConfig,
    AutoencoderPrecisionConfig,
    AutoencoderRunConfig,
    DiscriminatorConfig,
    LossConfig,
)
from megasora.config.dc_ae import DCAEConfig
from megasora.config.distillation import DistillationConfig
from megasora.config.schema import CheckpointConfig, OptimizerConfig, TrainConfig


def _adam(lr: float, *, ema_decay: float = 0.0) -> OptimizerConfig:
    """repo: HybridAdam with adamw, betas 0.9 and 0.98, eps 1e-8, no decay, gradients clipped at norm 1, no warm-up. P3: AdamW, betas
    0.9 and 0.999, eps 1e-15."""
    return OptimizerConfig(lr=lr, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.0, clip_grad=1.0, warmup_steps=0, ema_decay=ema_decay)


def dc_ae_stage1() -> AutoencoderRunConfig:
    """Video DC-AE from random weights: L1 and LPIPS on 32 frames of 256px. P3: 250 k steps on 8 GPUs; repo video_dc_ae.py."""
    return AutoencoderRunConfig(
        recipe="dc_ae_stage1",
        # repo: dc-ae-f32t4c128, grad_checkpoint off
        autoencoder=AutoencoderConfig(kind="dc-ae", sizes=DCAEConfig()),
        # P3, repo: L1 + 0.5 LPIPS; no KL, the posterior has no spread. The scale is the published one, for the rates were chosen with it
        loss=LossConfig(distance="l1", lpips_weight=0.5, kl_weight=0.0, reduction="sum"),
        discriminator=DiscriminatorConfig(weight=0.0),
        # repo: bf16
        precision=AutoencoderPrecisionConfig(dtype="bf16"),
        data=AutoencoderDataConfig(
            # P3: 8 GPUs; repo: batch 1 per GPU
            batch_size=8,
            # repo: 20 % of a rank's steps use frame 0 alone (rank 0 never; 0.2286 of the others'); here every clip draws for itself
            image_share=0.2,
            # repo: 256px_ar1:1, fps_max 24
            resolution="256px",
            aspect="square",
            # P3, repo: 32 frames
            frame_counts=(32,),
            target_fps=24.0,
            temporal_start="random",
        ),
        # P3, repo: 5e-5, constant; repo: EMA 0.99 over the fp32 master weights
        optimizer=_adam(5e-5, ema_decay=0.99),
        # chosen; repo: ckpt_every 3000, keep_n_latest 50
        checkpoint=CheckpointConfig(interval_steps=1000, keep=3, keep_every_steps=50_000),
        # chosen
        evaluation=AutoencoderEvalConfig(interval_steps=1000),
        # P3: 250 k; repo says epochs 100 only
        train=TrainConfig(steps=250_000),
    )


def dc_ae_stage2() -> AutoencoderRunConfig:
    """The same with a discriminator, from stage 1's weights and a new discriminator. P3: 200 k steps; repo video_dc_ae_disc.py."""
    stage1 = dc_ae_stage1()
    return replace(
        stage1,
        recipe="dc_ae_stage2",
        # repo: grad_checkpoint on in stage 2
        autoencoder=replace(stage1.autoencoder, recompute="stages"),
        discriminator=DiscriminatorConfig(
            # P3: + 0.05 L_adv, a plain factor; repo: disc_weight 0.05 times the adaptive weight, hinge, from step 0
            weight=0.05,
            start_step=0,
            loss="hinge",
            balance="adaptive",
            # repo: NLayerDiscriminator3D, ndf 64, n_layers 5, batch norm at batch 1 (norm clip), dropout 0.3
            width=64,
            num_layers=5,
            norm="clip",
            dropout=0.3,
            # P3, repo: 1e-4
            optimizer=_adam(1e-4),
        ),
        # repo: only the autoencoder's weights are loaded
        init=AutoencoderInitConfig(follows="dc_ae_stage1"),
        # P3: 200 k
        train=TrainConfig(steps=200_000),
    )


def dc_ae_distill() -> AutoencoderRunConfig:
    """Stage 2 gone on with, features aligned with a DINOv2's; --distillation.teacher takes its folder. P3 4.3.3 has no number."""
    stage2 = dc_ae_stage2()
    return replace(
        stage2,
        recipe="dc_ae_distill",
        distillation=DistillationConfig(
            # VA-VAE's text: 0.1, margins 0.5 and 0.25, adaptive (its first 100 epochs, from nothing, have 0.5 and no margins)
            weight=0.1,
            balance="adaptive",
            cosine_margin=0.5,
            gram_margin=0.25,
            # P3: "third-layer", "similar shapes"
            layer="stages.3",
            # chosen, P3 is silent: see config/distillation.py for the reasons
            frames="mean",
            normalisation="imagenet",
            projector="conv",
            trained="all",
            # VA-VAE: 1e-4
            optimizer=_adam(1e-4),
        ),
        # P3: after the autoencoder's training
        init=AutoencoderInitConfig(follows="dc_ae_stage2"),
        # unpublished; chosen
        train=TrainConfig(steps=50_000),
    )


def hunyuan_vae_finetune() -> AutoencoderRunConfig:
    """HunyuanVideo's autoencoder trained on, with KL and a discriminator; --init.weights takes its folder. history hunyuan_video.py."""
    return AutoencoderRunConfig(
        recipe="hunyuan_vae_finetune",
        autoencoder=AutoencoderConfig(kind="hunyuan", temporal_compression=4, spatial_compression=8, recompute="stages"),
        # history: LPIPS 0.1, KL 1e-6 (HunyuanVideo's own paper, arXiv 2412.03603: L1 + 0.1 LPIPS + 0.05 adversarial + 1e-6 KL)
        loss=LossConfig(distance="l1", lpips_weight=0.1, kl_weight=1e-6, reduction="sum"),
        discriminator=DiscriminatorConfig(
            # history: 0.05 from step 0, wgan-gp without its penalty or hinge
            weight=0.05,
            loss="hinge",
            balance="adaptive",
            # history: D lr 1e-5
            optimizer=_adam(1e-5),
        ),
        precision=AutoencoderPrecisionConfig(dtype="bf16"),
        data=AutoencoderDataConfig(
            # history: batch 2 per GPU; 8 GPUs as for the DC-AE
            batch_size=16,
            # history: 25 % images (HunyuanVideo's paper: 4 clips to an image)
            image_share=0.25,
            # history: 33 frames of 256px, 1:1, at an interval drawn up to 8
            resolution="256px",
            aspect="square",
            frame_counts=(33,),
            max_frame_interval=8,
        ),
        # history: AE lr 5e-6, EMA 0.99
        optimizer=_adam(5e-6, ema_decay=0.99),
        checkpoint=CheckpointConfig(interval_steps=1000, keep=3),
        evaluation=AutoencoderEvalConfig(interval_steps=1000),
        # unpublished; chosen
        train=TrainConfig(steps=50_000),
    )


def tiny_ae() -> AutoencoderRunConfig:
    """A small DC-AE (4x4x4) on 32px clips that it makes itself, with a small discriminator from half-way. For laptops and tests."""
    sizes = DCAEConfig(
        widths=(8, 16, 32),
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 1),
        attention_from=2,
        temporal_stages=(0, 1),
        latent_channels=32,
        head_dim=16,
    )
    return AutoencoderRunConfig(
        recipe="tiny_ae",
        autoencoder=AutoencoderConfig(kind="dc-ae", sizes=sizes, spatial_compression=4),
        # no LPIPS: its weights are the user's to give
        loss=LossConfig(distance="l1", lpips_weight=0.0, reduction="mean"),
        discriminator=DiscriminatorConfig(
            weight=0.05,
            start_step=200,
            width=16,
            num_layers=3,
            dropout=0.0,
            optimizer=OptimizerConfig(lr=5e-5, beta1=0.5, beta2=0.9, eps=1e-8, ema_decay=0.0),
        ),
        precision=AutoencoderPrecisionConfig(dtype="fp32"),
        data=AutoencoderDataConfig(
            batch_size=2,
            image_share=0.2,
            resolution="32px",
            aspect="square",
            frame_counts=(8, 1),
            target_fps=12.0,
        ),
        optimizer=OptimizerConfig(lr=4e-3, lr_milestones=((200, 2e-3),), warmup_steps=10, beta2=0.98, eps=1e-8, ema_decay=0.95),
        checkpoint=CheckpointConfig(interval_steps=100, keep=3),
        evaluation=AutoencoderEvalConfig(interval_steps=50),
        train=TrainConfig(steps=400, log_interval_steps=20),
    )


def tiny_ae_distill() -> AutoencoderRunConfig:
    """tiny_ae with features aligned from the start with those of a small random DINOv2 that it makes itself. For laptops and tests."""
    return replace(
        tiny_ae(),
        recipe="tiny_ae_distill",
        distillation=DistillationConfig(
            weight=0.5,
            # 8 x 8 places of 32px, 32 channels
            layer="stages.1",
            cosine_margin=0.0,
            gram_margin=0.0,
            optimizer=OptimizerConfig(lr=4e-3, beta2=0.98, eps=1e-8, ema_decay=0.0),
        ),
    )
