"""Names and shapes of a video DC-AE's tensors, and their counterparts in diffusers' AutoencoderDC, which is the same network of pictures.

A kernel of pictures becomes the middle frame of a kernel of clips, whose other frames are zero; a picture's frame has nothing beside it, so
the middle frame alone is what acts on pictures, there and back. The attention's rows keep their order: diffusers' to_q, to_k and to_v are
the thirds of one matrix whose heads hold q, k and v one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megasora.config.dc_ae import DCAEConfig
from megasora.config.errors import UserError

Shape = tuple[int, ...]
Change = Literal["same", "inflate", "middle"]
IMAGE_CLASS = "AutoencoderDC"
AGGREGATION, EXPANSION = 5, 8
"""Side of the second scale's kernel; channels between the gated convolution's, per channel of the block."""
FIXED: Mapping[str, Any] = {
    "in_channels": 3,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
}
"""What a network of pictures must be to become one of clips: dc-ae-f32c32-sana-1.0 is."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one tensor is made of."""

    sources: tuple[str, ...]
    """Stacked by rows; empty for one that the other side does not have."""
    change: Change = "same"


def tensor_shapes(config: DCAEConfig) -> dict[str, Shape]:
    """Every tensor of the encoder and the decoder, in the order of the released file."""
    widths, latent, last = config.widths, config.latent_channels, len(config.widths) - 1
    shapes = dict(_conv("encoder.project_in.conv", 3, widths[0]))
    for stage, depth in enumerate(config.encoder_depths):
        for block in range(depth):
            shapes.update(_block(f"encoder.stages.{stage}.op_list.{block}", config, stage))
        if stage < last:
            shapes.update(_conv(f"encoder.stages.{stage}.op_list.{depth}.main.conv", widths[stage], widths[stage + 1]))
    shapes.update(_conv("encoder.project_out.main.op_list.0.conv", widths[-1], latent))
    shapes.update(_conv("decoder.project_in.main.conv", latent, widths[-1]))
    for stage, depth in enumerate(config.decoder_depths):
        step = stage < last
        if step:
            shapes.update(_conv(f"decoder.stages.{stage}.op_list.0.main.conv.conv", widths[stage + 1], widths[stage]))
        for block in range(depth):
            shapes.update(_block(f"decoder.stages.{stage}.op_list.{block + step}", config, stage))
    shapes.update(_norm("decoder.project_out.op_list.0", widths[0]))
    shapes.update(_conv("decoder.project_out.op_list.2.conv", widths[0], 3))
    return shapes


def _conv(name: str, inputs: int, outputs: int, *, kernel: int = 3, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel, kernel)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _block(name: str, config: DCAEConfig, stage: int) -> Iterator[tuple[str, Shape]]:
    width = config.widths[stage]
    if stage < config.attention_from:
        yield from _conv(f"{name}.main.conv1.conv", width, width)
        yield from _conv(f"{name}.main.conv2.conv", width, width, bias=False)
        yield from _norm(f"{name}.main.conv2.norm", width)
        return
    attention, gated, wide = f"{name}.context_module.main", f"{name}.local_module.main", EXPANSION * width
    yield from _conv(f"{attention}.qkv.conv", width, 3 * width, kernel=1, bias=False)
    yield from _conv(f"{attention}.aggreg.0.0", 1, 3 * width, kernel=AGGREGATION, bias=False)
    yield from _conv(f"{attention}.aggreg.0.1", config.head_dim, 3 * width, kernel=1, bias=False)
    yield from _conv(f"{attention}.proj.conv", 2 * width, width, kernel=1, bias=False)
    yield from _norm(f"{attention}.proj.norm", width)
    yield from _conv(f"{gated}.inverted_conv.conv", width, wide, kernel=1)
    yield from _conv(f"{gated}.depth_conv.conv", 1, wide)
    yield from _conv(f"{gated}.point_conv.conv", wide // 2, width, kernel=1, bias=False)
    yield from _norm(f"{gated}.point_conv.norm", width)


def image_names(key: str) -> tuple[str, ...]:
    """The tensors of diffusers' AutoencoderDC that a tensor of ours is stacked of."""
    for ours, theirs in _ENDS.items():
        if key.startswith(ours):
            return (theirs + key.removeprefix(ours),)
    half, _, stage, _, operation, *rest = key.split(".")
    place = f"{half}.{'down' if half == 'encoder' else 'up'}_blocks.{stage}.{operation}"
    inside, kind = ".".join(rest[:-1]), rest[-1]
    if inside == "context_module.main.qkv.conv":
        return tuple(f"{place}.attn.to_{part}.{kind}" for part in "qkv")
    return (f"{place}.{_INSIDE[inside]}.{kind}",)


_ENDS = {
    "encoder.project_in.conv": "encoder.conv_in",
    "encoder.project_out.main.op_list.0.conv": "encoder.conv_out",
    "decoder.project_in.main.conv": "decoder.conv_in",
    "decoder.project_out.op_list.0": "decoder.norm_out",
    "decoder.project_out.op_list.2.conv": "decoder.conv_out",
}
_INSIDE = {
    "main.conv": "conv",
    "main.conv.conv": "conv",
    "main.conv1.conv": "conv1",
    "main.conv2.conv": "conv2",
    "main.conv2.norm": "norm",
    "context_module.main.aggreg.0.0": "attn.to_qkv_multiscale.0.proj_in",
    "context_module.main.aggreg.0.1": "attn.to_qkv_multiscale.0.proj_out",
    "context_module.main.proj.conv": "attn.to_out",
    "context_module.main.proj.norm": "attn.norm_out",
    "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
    "local_module.main.depth_conv.conv": "conv_out.conv_depth",
    "local_module.main.point_conv.conv": "conv_out.conv_point",
    "local_module.main.point_conv.norm": "conv_out.norm",
}
_MATRICES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out")
"""Kernels of one place that diffusers stores as matrices."""


def image_shape(name: str, ours: Shape, parts: int) -> Shape:
    """Shape of a tensor of AutoencoderDC, `ours` being the tensor that `parts` of them make."""
    if len(ours) == 1:
        return ours
    matrix = any(name.endswith(f"{one}.weight") for one in _MATRICES)
    return (ours[0] // parts, ours[1]) if matrix else (ours[0], *ours[1:2], *ours[3:])


def from_images(config: DCAEConfig, images: DCAEConfig) -> dict[str, Piece]:
    """What the tensors of a network of clips are made of; with other latent channels the two layers at the latent have no source."""
    shapes, theirs = tensor_shapes(config), tensor_shapes(images)
    pieces: dict[str, Piece] = {}
    for key, shape in shapes.items():
        if theirs[key] != shape:
            pieces[key] = Piece(sources=())
        else:
            pieces[key] = Piece(sources=image_names(key), change="inflate" if len(shape) == 5 else "same")
    return pieces


def image_tensors(config: DCAEConfig) -> tuple[dict[str, Shape], dict[str, tuple[Piece, int]]]:
    """The tensors of the network of pictures, and what each is made of: a piece and the first row that is its own."""
    shapes: dict[str, Shape] = {}
    pieces: dict[str, tuple[Piece, int]] = {}
    for key, shape in tensor_shapes(config).items():
        names = image_names(key)
        for number, name in enumerate(names):
            shapes[name] = image_shape(name, shape, len(names))
            pieces[name] = (Piece(sources=(key,), change="middle" if len(shape) == 5 else "same"), number * shapes[name][0])
    return shapes, pieces


def image_config(config: DCAEConfig) -> dict[str, Any]:
    """config.json of the network of pictures."""
    stages = len(config.widths)
    kinds = ["ResBlock" if stage < config.attention_from else "EfficientViTBlock" for stage in range(stages)]
    scales: list[list[int]] = [[] if stage < config.attention_from else [AGGREGATION] for stage in range(stages)]
    return {
        "_class_name": IMAGE_CLASS,
        **FIXED,
        "latent_channels": config.latent_channels,
        "attention_head_dim": config.head_dim,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": list(config.widths),
        "decoder_block_out_channels": list(config.widths),
        "encoder_layers_per_block": list(config.encoder_depths),
        "decoder_layers_per_block": list(config.decoder_depths),
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "scaling_factor": config.scaling_factor,
    }


def clip_config(facts: Mapping[str, Any], *, where: str) -> DCAEConfig:
    """Sizes of the network of clips that an AutoencoderDC's config.json describes; the last two steps of the encoder halve time.

    Raises:
        UserError: it has parts that ours does not.
    """
    try:
        widths, kinds = tuple(facts["encoder_block_out_channels"]), list(_each(facts["encoder_block_types"], facts))
        attention_from = kinds.index("EfficientViTBlock") if "EfficientViTBlock" in kinds else len(kinds)
        config = DCAEConfig(
            widths=widths,
            encoder_depths=tuple(facts["encoder_layers_per_block"]),
            decoder_depths=tuple(facts["decoder_layers_per_block"]),
            attention_from=attention_from,
            temporal_stages=tuple(range(max(0, len(widths) - 3), len(widths) - 1)),
            latent_channels=int(facts["latent_channels"]),
            head_dim=int(facts["attention_head_dim"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} does not describe an {IMAGE_CLASS}: {error}") from error
    wanted = image_config(config)
    for name, value in wanted.items():
        given = facts.get(name, value)
        found = list(_each(given, facts)) if isinstance(value, list) else given
        if name not in ("_class_name", "scaling_factor") and _plain(found) != value and set(_plain([found])[0]) != {value}:
            raise UserError(f"{where}: {name} is {given} and must be {value}; a network as dc-ae-f32c32-sana-1.0 becomes one of clips")
    if wrong := config.problems():
        raise UserError(f"{where}: {wrong[0]}")
    return config


def _each(value: Any, facts: Mapping[str, Any]) -> Sequence[Any]:
    """A value for each stage, where one may stand for all."""
    return [value] * len(facts["encoder_block_out_channels"]) if isinstance(value, str) else list(value)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def config_of_shapes(shapes: Mapping[str, Shape]) -> DCAEConfig:
    """Sizes of a file of tensors without a config.json. Which steps halve time leaves no trace in shapes: the last two, as released.

    Raises:
        UserError: the tensors are of no video DC-AE.
    """
    try:
        stages = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.stages."))
        kinds = {stage: f"encoder.stages.{stage}.op_list.0.context_module.main.qkv.conv.weight" in shapes for stage in range(stages)}
        attention_from = min((stage for stage, attends in kinds.items() if attends), default=stages)
        first = [
            shapes[f"encoder.stages.{stage}.op_list.0.{'context_module.main.qkv' if kinds[stage] else 'main.conv1'}.conv.weight"][1]
            for stage in range(stages)
        ]
        heads = f"encoder.stages.{attention_from}.op_list.0.context_module.main.aggreg.0.1.weight"
        return DCAEConfig(
            widths=tuple(first),
            encoder_depths=tuple(_count(shapes, "encoder", stage) - (stage + 1 < stages) for stage in range(stages)),
            decoder_depths=tuple(_count(shapes, "decoder", stage) - (stage + 1 < stages) for stage in range(stages)),
            attention_from=attention_from,
            temporal_stages=tuple(range(max(0, stages - 3), stages - 1)),
            latent_channels=shapes["encoder.project_out.main.op_list.0.conv.weight"][0],
            head_dim=shapes[heads][1] if heads in shapes else DCAEConfig.head_dim,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"the tensors are of no video DC-AE: {error} is missing") from error


def _count(shapes: Mapping[str, Shape], half: str, stage: int) -> int:
    prefix = f"{half}.stages.{stage}.op_list."
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
