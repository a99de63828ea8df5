"""Settings of latent distillation: an autoencoder that is trained has features of its encoder aligned with those of a frozen teacher.

arXiv 2503.09642v3 section 4.3.3 ("P3") says that after the autoencoder's training a distillation loss aligns "third-layer" latents with
DINOv2, chosen for similar shapes, and no more: no formula, weight, projector, size or steps, and its repository has no line of it. What it
cites as its reason is VA-VAE (arXiv 2501.01423, hustvl/LightningDiT), whose loss this is; where that is silent, for it knows no time, each
choice is a setting here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megasora.config.schema import OptimizerConfig

LATENT = "latent"


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A term of the autoencoder's loss: mean relu(1 - cosine_margin - cosine) + mean relu(|gram - teacher's gram| - gram_margin)."""

    weight: float = 0.0
    """Of the term; 0: there is none. VA-VAE: 0.5 in its first phase, 0.1 in the later ones and in its text."""
    balance: Literal["adaptive", "plain"] = "adaptive"
    """adaptive (VA-VAE): weight x |gradient of all other losses| / |its gradient| at the last weight of the aligned layer, of each clip,
    so that the weight means the same whatever loss.reduction is; plain: weight itself. VA-VAE takes the reconstruction's gradient alone;
    here the generator's loss, a twentieth of it, is in it too, which saves a second way back through the decoder."""
    teacher: str | None = None
    """Folder of a DINOv2 (transformers' Dinov2Model or Dinov2WithRegistersModel). Never random; tiny_ae_distill makes a small random one.
    VA-VAE: ViT-L/14; P3 names no size, and ViT-L's 1024 channels are those of the likeliest layer."""
    cache: str | None = None
    """Folder that megasora data encode made with this recipe: the teacher's features of every clip are read there, and the teacher is not
    loaded. For clips that are the same each time (data.temporal_start first). 8.4 MB for a clip of 32 frames of 256px at stages.3 in bf16,
    where ViT-L/14 takes about 5 TFLOP and the rest of the clip's step 225."""
    layer: str = "stages.3"
    """What is aligned: stages.N, the output of a stage of the encoder counted from 0, or latent. P3 says "third-layer latents", "for
    similar shapes": stages.3 of the published sizes gives 16 x 16 x 1024 of a 256px frame, which is just what ViT-L/14 gives of 224px.
    VA-VAE: latent."""
    frames: Literal["mean", "first"] = "mean"
    """A place of the layer covers several frames and the teacher sees one at a time: mean of its features over them, so that none is left
    out, or those of the first alone, which costs that much less. P3 is silent; VA-VAE has pictures only."""
    teacher_px: int | None = None
    """Shorter side of the teacher's frames, a multiple of its patch; its features are then resized bilinearly to the aligned grid. None:
    one patch for each place of the grid (224px for stages.3 of 256px, as VA-VAE)."""
    normalisation: Literal["imagenet", "none"] = "imagenet"
    """Of the teacher's input: ImageNet's mean and deviation, with which DINOv2 was trained (transformers' processor), or pixels in [-1, 1]
    as they are, as VA-VAE gives them."""
    projector: Literal["conv", "mlp"] = "conv"
    """Brings the layer's channels to the teacher's: conv, one 1x1 convolution without bias (VA-VAE), which leaves the work to the encoder;
    mlp, three layers with SiLU (REPA, arXiv 2410.06940), for features that are far from the teacher's. It is no part of the
    autoencoder."""
    projector_width: int = 2048
    """Of an mlp's inner layers. REPA: 2048."""
    cosine_margin: float = 0.5
    """Cosines above 1 minus this count as aligned. VA-VAE: 0.5 in its text and last phase, 0 before."""
    gram_margin: float = 0.25
    """Differences of two places' cosine below this do not count. VA-VAE: 0.25 in its text and last phase, 0 before."""
    gram: Literal["frame", "clip"] = "frame"
    """Pairs of places whose cosines are compared: of a frame of the layer (VA-VAE's, of a picture), or of the whole clip, whose number
    grows with the square of its length: 4,096 x 4,096 for stages.3 of 32 frames of 256px."""
    trained: Literal["all", "encoder"] = "all"
    """all: the decoder learns on too (VA-VAE); encoder: it stays as it is, so that latents must stay readable for it. P3 is silent."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, beta2=0.98, eps=1e-8, ema_decay=0.0))
    """Of the projector, whose loss is the term without its weight. VA-VAE: 1e-4, in the autoencoder's own. No moving average is kept."""

    @property
    def stage(self) -> int | None:
        """Number of the aligned stage; None for the latent.

        Raises:
            ValueError: layer is neither.
        """
        if self.layer == LATENT:
            return None
        name, _, number = self.layer.partition(".")
        if name != "stages" or not number.isdecimal():
            raise ValueError(f"{self.layer} is no layer")
        return int(number)
