"""The autoencoder that is trained: its networks with gradients, one clip at a time, and what they start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from megasora.config.autoencoder_run import AutoencoderConfig, DiscriminatorConfig
from megasora.config.dc_ae import CLASS_NAME as DC_AE
from megasora.config.dc_ae import read_config
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.schema import SlabAxis
from megasora.models.autoencoders.autoencoder import Network
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.hunyuan import CLASS_NAME as HUNYUAN
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.autoencoders.slabs import SlabbedNetwork
from megasora.training.autoencoder.share import ClipShare

CLASSES = {"dc-ae": DC_AE, "hunyuan": HUNYUAN}
CURES = {
    "dc-ae": "make the folder with megasora convert --to dc-ae, or use --autoencoder.kind hunyuan for HunyuanVideo's",
    "hunyuan": "give diffusers' folder of HunyuanVideo's, or use --autoencoder.kind dc-ae",
}


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an autoencoder makes of a clip, or this rank's part of it."""

    pixels: Float[Tensor, "3 t h w"]
    """Near [-1, 1], not clamped, in the networks' type."""
    posterior: Posterior


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """Networks and what training asks of them."""

    network: Network
    last_weight: nn.Parameter
    """Of the decoder's last convolution, where losses are weighed against each other (DCAE.get_last_layer)."""
    about: dict[str, Any]
    """config.json of its folder."""
    axis: SlabAxis = "height"
    """Of the slabs of clips."""
    slabbed: Mapping[SlabAxis, SlabbedNetwork] = field(default_factory=dict)
    """The same network over the ranks that share a clip; empty where none do."""

    @property
    def module(self) -> nn.Module:
        """All parameters."""
        return self.network.module

    def shared_by(self, group: dist.ProcessGroup, *, axis: SlabAxis) -> TrainedNetwork:
        """The same, each clip over the ranks of a group; all of them call it together, with the networks on their device.

        Args:
            group: ranks of a clip.
            axis: of its slabs; a picture is always cut by height.

        Raises:
            UserError: it cannot be split so.
        """
        if group.size() == 1:
            return self
        axes: tuple[SlabAxis, ...] = ("height",) if axis == "height" else ("height", "time")
        slabbed = {one: self.network.in_slabs(group, axis=one) for one in axes}
        return replace(self, axis=axis, slabbed=cast(Mapping[SlabAxis, SlabbedNetwork], slabbed))

    def share(self, *, num_frames: int, height: int, width: int) -> ClipShare:
        """This rank's part of a clip of this size.

        Raises:
            UserError: a size that the autoencoder does not take.
        """
        size = {"num_frames": num_frames, "height": height, "width": width}
        self.network.facts.refuse(num_frames, height, width)
        if not self.slabbed:
            return ClipShare(slabs=None, **size)
        return ClipShare(slabs=self.slabbed["height" if num_frames == 1 else self.axis].clip(**size), **size)

    def reconstruct(self, part: Float[Tensor, "3 t h w"], share: ClipShare, *, key: int | None) -> Reconstruction:
        """A clip in [-1, 1] through encoder and decoder, or this rank's slab of it.

        Args:
            part: what this rank has of the clip, by `share.slab`.
            share: which part that is.
            key: of the posterior's sample, where it has a spread; None takes its mean.
        """
        network, way = self.network, share.slabs
        pixels = part[None].to(self.last_weight.device, self.last_weight.dtype)
        posterior = network.posterior(network.moments(pixels) if way is None else way.encode(pixels))
        latent = posterior.mean
        if key is not None and self.about["_class_name"] == HUNYUAN:
            shape = network.facts.latent_shape(share.num_frames, share.height, share.width)
            latent = share.sample(posterior, shape=shape, key=key)
        made = network.pixels(latent[None]) if way is None else way.decode(latent[None])
        return Reconstruction(pixels=made[0], posterior=posterior)


def new_discriminator(settings: DiscriminatorConfig) -> ClipDiscriminator:
    """Of a run's sizes, without start values."""
    return ClipDiscriminator(width=settings.width, num_layers=settings.num_layers, norm=settings.norm, dropout=settings.dropout)


def new_network(settings: AutoencoderConfig, *, weights: str | None, load: bool, seed: int) -> TrainedNetwork:
    """Networks in fp32 on the CPU, with gradients.

    Args:
        settings: which, and a DC-AE's sizes.
        weights: folder of HunyuanVideo's, which says its sizes, or of a DC-AE to start from.
        load: whether the folder's weights are taken; a run that goes on has its own.
        seed: of random weights, the same on every rank.

    Raises:
        UserError: the folder is of another autoencoder, of other sizes, or does not load.
    """
    network = _hunyuan(Path(str(weights)), load=load) if settings.kind == "hunyuan" else _dc_ae(settings, weights if load else None, seed)
    facts = network.facts
    for name in ("temporal_compression", "spatial_compression"):
        if getattr(facts, name) != getattr(settings, name):
            raise UserError(
                f"init.weights {weights} has {name} {getattr(facts, name)}, the run says {getattr(settings, name)}; "
                f"use --autoencoder.{name} {getattr(facts, name)} or give another folder"
            )
    module = network.module.requires_grad_(True).train()
    about = {"_class_name": facts.name, **_sizes_of(module)}
    return TrainedNetwork(network=network, last_weight=module.get_parameter(_LAST[settings.kind]), about=about)


_LAST = {"dc-ae": "decoder.project_out.op_list.2.conv.weight", "hunyuan": "decoder.conv_out.conv.weight"}


def _sizes_of(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, VideoDCAE):
        sizes: dict[str, Any] = to_dict(module.config)
        return sizes
    config: Any = module.config
    return {name: value for name, value in json.loads(json.dumps(dict(config))).items() if not name.startswith("_")}


def _dc_ae(settings: AutoencoderConfig, weights: str | None, seed: int) -> DCAENetwork:
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = VideoDCAE(settings.sizes)
    else:
        folder = Path(weights)
        refuse_other_class(folder, "dc-ae")
        if (sizes := read_config(folder)) != settings.sizes:
            wrong = [name for name in vars(sizes) if getattr(sizes, name) != getattr(settings.sizes, name)]
            has = ", ".join(f"{name} {getattr(sizes, name)}" for name in wrong)
            raise UserError(f"init.weights {folder} is of other sizes: {has}; set --autoencoder.sizes.{wrong[0]} or give another folder")
        try:
            module = DCAENetwork.load(folder, dtype=torch.float32).module
        except UserError as error:
            raise UserError(str(error).replace("encoders.vae", "init.weights")) from error
    module.encoder.recompute = module.decoder.recompute = settings.recompute
    return DCAENetwork(module)


def _hunyuan(folder: Path, *, load: bool) -> HunyuanNetwork:
    about = refuse_other_class(folder, "hunyuan")
    try:
        network = HunyuanNetwork.load(folder, dtype=torch.float32) if load else HunyuanNetwork.blank(about)
    except UserError as error:
        raise UserError(str(error).replace("encoders.vae", "init.weights")) from error
    return network


def refuse_other_class(folder: Path, kind: str) -> dict[str, Any]:
    """config.json of a folder of this kind.

    Raises:
        UserError: it is none, or of another class.
    """
    file = folder / "config.json"
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = about.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"init.weights {folder} is no autoencoder's folder (config.json: {type(error).__name__}); {CURES[kind]}") from error
    if name != CLASSES[kind]:
        raise UserError(f"init.weights {folder} is of class {name}, the run trains {CLASSES[kind]}; {CURES[kind]}")
    return about


def recompute_blocks(network: TrainedNetwork, settings: AutoencoderConfig) -> None:
    """Let diffusers' class keep the inputs of its blocks only; a DC-AE has been told when it was made."""
    module: Any = network.module
    if settings.kind == "hunyuan" and settings.recompute == "stages":
        module.enable_gradient_checkpointing()
