"""The schema of a run that trains an autoencoder of clips: a family beside `schema.RunConfig`, with which it shares the parts that mean the
same (optimizer, checkpoints, recovery, guard, traces). `megasora train-ae` takes it.

Sources: "P3" is arXiv 2503.09642v3 section 4.4, "repo" hpcaitech/Open-Sora (configs/vae/train, opensora/models/vae).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megasora.config.dc_ae import DCAEConfig
from megasora.config.distillation import DistillationConfig
from megasora.config.schema import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    EncodersConfig,
    GuardConfig,
    OptimizerConfig,
    ProfileConfig,
    RecoveryConfig,
    SlabAxis,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What is trained."""

    kind: Literal["dc-ae", "hunyuan"] = "dc-ae"
    """The video DC-AE (its posterior has no spread) or HunyuanVideo's (a KL posterior, a sample of which is decoded)."""
    sizes: DCAEConfig = field(default_factory=DCAEConfig)
    """Of a DC-AE; HunyuanVideo's has those of the config.json in init.weights."""
    temporal_compression: int = 4
    """Frames per latent frame; the data are planned with it."""
    spatial_compression: int = 32
    """Pixels per latent pixel: 32 of the published DC-AE, 8 of HunyuanVideo's."""
    recompute: Literal["none", "stages"] = "none"
    """stages: keep the input of each stage (of HunyuanVideo's, of each block) only and compute the rest again in the backward pass. repo:
    off in stage 1, on in stage 2; 96 frames or 512px need it."""

    @property
    def causal(self) -> bool:
        """Whether frame 0 has a latent frame of its own."""
        return self.kind == "hunyuan"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the autoencoder is trained for, beside the discriminator."""

    distance: Literal["l1", "l2"] = "l1"
    """Of pixels in [-1, 1]. P3: L1."""
    lpips_weight: float = 0.5
    """P3: 0.5. HunyuanVideo's: 0.1."""
    lpips: str | None = None
    """Folder of LPIPS's weights: torchvision's vgg16 or alexnet and lpips/weights/v0.1's lin layers. Never random.
    repo: VGG16 (opensora/models/vae/lpips.py)."""
    kl_weight: float = 0.0
    """Of the KL divergence from a normal distribution. HunyuanVideo's: 1e-6; a DC-AE has none."""
    reduction: Literal["sum", "mean"] = "mean"
    """sum, as published (repo opensora/models/vae/losses.py): a frame's loss is the sum over its channels and pixels, a clip's the mean of
    its frames', its KL the sum over its latent. mean: the same divided by a frame's 3 H W, so that a number means the same at each size,
    and clip_grad, the guard and the constants of the adaptive weight work on numbers near 1. Adam's step is nearly the same either way."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A PatchGAN of clips (repo NLayerDiscriminator3D) that learns to tell clips from their reconstructions."""

    weight: float = 0.0
    """Of its loss in the autoencoder's; 0: there is no discriminator. P3: 0.05."""
    start_step: int = 0
    """Steps of the autoencoder before it takes part, and before it learns. repo: 0, in a stage of its own."""
    loss: Literal["hinge", "vanilla", "wasserstein"] = "hinge"
    """repo: hinge for the DC-AE. wasserstein is the critic's difference without a gradient penalty, which repo's loop lacks too."""
    balance: Literal["adaptive", "plain"] = "adaptive"
    """adaptive (repo): weight x |gradient of the reconstruction loss| / |its gradient| at the decoder's last convolution, of each clip;
    plain (P3's text): weight itself."""
    width: int = 64
    """Channels of the first layer (ndf)."""
    num_layers: int = 5
    """Layers that halve height and width; the first two halve the frames too."""
    norm: Literal["clip", "group", "none"] = "clip"
    """clip: each channel over the clip's own places and frames, which the published batch norm does at its batch of one clip per GPU.
    A norm over several clips would make a clip's loss depend on which others are on its rank. group: over 32 groups of channels."""
    dropout: float = 0.3
    """After each normed layer (repo); its draws are functions of the sample and the step."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, beta2=0.98, eps=1e-8, ema_decay=0.0))
    """P3: lr 1e-4. No moving average is kept of it (ema_decay 0)."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderDataConfig:
    """Which clips are trained on, and how a step is filled: a fixed number of the next clips of the epoch's permutation."""

    manifest: str | None = None
    """csv or parquet table of clips, as `megasora train` takes it; captions are not looked at."""
    eval_manifest: str | None = None
    """Held-out clips that are reconstructed at intervals; None turns it off."""
    batch_size: int = 8
    """Clips of a step, over all ranks, whichever there are. Published: 1 per GPU on 8 GPUs."""
    image_share: float = 0.0
    """Share of the clips of which only the first frame is taken; drawn for each clip each time. repo: 0.2 of a rank's steps."""
    resolution: str = "256px"
    """Resolution class: '256px', '480p', any number; 'manifest' for the clips' own sizes rounded down."""
    aspect: Literal["square", "nearest"] = "square"
    """Of a class Npx: N x N out of the middle of every clip (repo: 256px_ar1:1), or the nearest of its sizes."""
    frame_counts: tuple[int, ...] = (32,)
    """Allowed frame counts, longest first; a clip takes the longest that it fills."""
    target_fps: float = 24.0
    """Clips are strided by the smallest whole number that brings them to at most this rate (repo: fps_max)."""
    max_frame_interval: int = 1
    """Frames are taken 1 to this many strides apart, drawn for each clip each time, evenly among those that it is long enough for.
    history: 8 for HunyuanVideo's (rand_sample_interval)."""
    temporal_start: Literal["first", "random"] = "random"
    """Where in a longer clip its frames begin."""
    decoder: Literal["auto", "pyav", "dali", "mixed"] = "auto"
    """As data.decoder of `megasora train`."""
    decode_workers: int = 2
    """Threads that decode ahead of the step on each rank."""
    decode_timeout_s: float = 120.0
    """A clip that takes longer is skipped."""
    quarantine_after: int = 3
    """Failures after which a clip is not decoded any more; 0 tries for ever."""
    prefetch_steps: int = 2
    """Steps whose clips are decoded ahead."""

    def planned_as(self) -> DataConfig:
        """The settings that clips are planned with: no text, and a budget that counts clips."""
        return DataConfig(
            manifest=self.manifest,
            resolution=self.resolution,
            frame_counts=self.frame_counts,
            target_fps=self.target_fps,
            temporal_start=self.temporal_start,
            text_tokens=0,
            global_tokens=1 << 62,
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderInitConfig:
    """What the weights start from; ignored with a notice on resume, but HunyuanVideo's sizes are still read there."""

    weights: str | None = None
    """Folder of an autoencoder: ours of a DC-AE (`megasora convert --to dc-ae`), diffusers' of HunyuanVideo's."""
    run: str | None = None
    """Folder of an earlier run of `megasora train-ae`, whose newest complete checkpoint gives the weights. Its discriminator stays there: a
    new one starts (repo stage 2: only the autoencoder's weights are loaded)."""
    run_weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights of that run; auto takes the moving average where there is one."""
    follows: str | None = None
    """Recipe that this stage goes on from."""
    seed: int = 1024
    """Seed of random weights, the discriminator's too."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderEvalConfig:
    """What is measured and shown during training."""

    interval_steps: int = 0
    """Steps between reconstructions of the held-out clips (PSNR, SSIM, and LPIPS where its weights are); 0 turns them off."""
    weights: Literal["model", "ema"] = "model"
    """Whose reconstructions: of the weights as they are trained, or of their moving average, which a run is usually used for."""
    max_clips: int = 16
    """Held-out clips that are measured."""
    shown_clips: int = 2
    """Of them shown in TensorBoard, the clip above its reconstruction."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderParallelConfig:
    """How the work is spread over ranks: whole clips or slabs of clips, optimizer state shared out over all ranks (ZeRO-1)."""

    context_parallel_size: int = 1
    """Ranks that share one clip, exactly: each has a slab, and asks its neighbours for the lines that convolutions reach."""
    context_parallel_axis: SlabAxis = "height"
    """What slabs are of. height takes clips and pictures of any kind; time needs no exchange of frames for LPIPS, and moves more between
    neighbours where a frame has more pixels than a row of all frames. Pictures are cut by height. HunyuanVideo's takes height only."""
    timeout_minutes: float = 30.0
    """How long a collective may wait before the job is ended."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderPrecisionConfig:
    """Number formats."""

    dtype: Dtype = "bf16"
    """Parameters and activations of both networks; bf16 keeps fp32 master weights and reduces gradients in fp32. Losses are in fp32."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderRunConfig:
    """Everything that defines a run of `megasora train-ae`."""

    recipe: str
    """Name of the recipe this came from."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    parallel: AutoencoderParallelConfig = field(default_factory=AutoencoderParallelConfig)
    precision: AutoencoderPrecisionConfig = field(default_factory=AutoencoderPrecisionConfig)
    data: AutoencoderDataConfig = field(default_factory=AutoencoderDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    init: AutoencoderInitConfig = field(default_factory=AutoencoderInitConfig)
    evaluation: AutoencoderEvalConfig = field(default_factory=AutoencoderEvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes cuda when there is one."""
    run_dir: str | None = None
    """Folder of the run; None makes runs/<recipe>."""
    resume_data: Literal["exact", "epoch", "restart"] = "exact"
    """Where a run goes on whose data, batch size or seed have changed since its checkpoint, as of `megasora train`."""

    @property
    def has_discriminator(self) -> bool:
        """Whether there is one."""
        return self.discriminator.weight > 0

    @property
    def has_distillation(self) -> bool:
        """Whether features are aligned with a teacher's."""
        return self.distillation.weight > 0

    def encoders_as(self) -> EncodersConfig:
        """The compression that clips are planned with."""
        settings = self.autoencoder
        return EncodersConfig(
            temporal_compression=settings.temporal_compression, spatial_compression=settings.spatial_compression, causal=settings.causal
        )
