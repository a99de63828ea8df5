"""The MMDiT of Open-Sora 2.0 (FLUX's architecture over video): text and video tokens, double blocks, single blocks, a velocity per token.

One forward serves every layout: a pipeline stage is this class with fewer blocks, without the embedders (`pre_process`) or without the
final layer (`post_process`). Between stages travels one tensor [s + n, H]: the joint token share, then the `vec` rows of the pack.
Recompute wraps blocks, FP8 wraps their linear layers; neither is a second forward.
Shape letters: s tokens of a share (text first), n samples of the pack, H hidden, C token channels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.blocks import DoubleBlock, FinalLayer, SingleBlock
from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.layers import MLPEmbedder, sinusoidal_embedding
from megasora.models.mmdit.offload import OffloadedPass
from megasora.models.mmdit.recompute import Seams, keep_inputs_only, keep_original_inputs
from megasora.models.mmdit.rotary import Rotation, StreamRotations, rotation_of
from megasora.models.mmdit.spec import LayerFactory, MMDiTSubmodules
from megasora.parallel.context import ContextAttention
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What the first stage takes: this rank's token shares and one row per sample."""

    img: Tensor
    """[num_video, C] noised latent tokens."""
    txt: Tensor
    """[num_text, text_dim] text embeddings."""
    t: Tensor
    """[n] time in [0, 1], fp32 or fp64."""
    y_vec: Tensor
    """[n, vec_dim] pooled text embeddings."""
    cond: Tensor | None
    """[num_video, C + patch^2] condition tokens; required exactly when the model has cond_in (zeros for text-only samples)."""
    guidance: Tensor | None = None
    """[n] distilled guidance scale; required exactly when the model has guidance_in."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Which part of the model a chunk is."""

    blocks: range
    """Indices into the list of double then single blocks."""
    pre_process: bool = True
    post_process: bool = True
    vp_stage: int | None = None
    recompute_double: int = 0
    """The first so many double blocks of the chunk are recomputed in the backward pass."""
    recompute_single: int = 0
    """The same for its single blocks."""
    selective: bool = False
    """The other blocks keep their matrix products and attention, and recompute the rest."""
    offload: bool = False
    """What the recomputed blocks keep is in host memory until their backward pass."""


class MMDiT(MegatronModule):
    """A chunk of the MMDiT.

    Args:
        model: sizes.
        config: Megatron-core's settings (`megatron_config.transformer_config`).
        stage: which blocks, and whether the embedders and the final layer are here.
        submodules: linear layer classes.
        context: this rank's groups.
        attention: attention over the context group.
        kernels: what is computed between matrix products and attention.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        config: TransformerConfig,
        stage: StageSpec,
        submodules: MMDiTSubmodules,
        context: ParallelContext,
        attention: ContextAttention,
        kernels: Kernels,
    ) -> None:
        super().__init__(config)
        self.model, self.stage = model, stage
        self.pre_process, self.post_process = stage.pre_process, stage.post_process
        self.vp_stage = stage.vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None
        self.tp_group = context.pg_collection.tp
        layers = LayerFactory(config=config, tp_group=self.tp_group, submodules=submodules, kernels=kernels)
        if stage.pre_process:
            self._build_embedders(layers)
        self.double_blocks = nn.ModuleDict()
        self.single_blocks = nn.ModuleDict()
        self._build_blocks(layers, attention)
        in_full = (list(self.double_blocks.values())[: stage.recompute_double], list(self.single_blocks.values())[: stage.recompute_single])
        self._recomputed = [block for kind in in_full for block in kind]
        self._offloaded: OffloadedPass | None = None
        if stage.post_process:
            self.final_layer = FinalLayer(model, layers=layers)

    def _build_blocks(self, layers: LayerFactory, attention: ContextAttention) -> None:
        model, stage = self.model, self.stage
        for index in stage.blocks:
            double = index < model.num_double_blocks
            blocks, in_full = (self.double_blocks, stage.recompute_double) if double else (self.single_blocks, stage.recompute_single)
            seams = Seams(selective=stage.selective and len(blocks) >= in_full)
            kind = DoubleBlock if double else SingleBlock
            block = kind(model, layers=layers, attention=attention, seams=seams)
            if seams.selective:
                keep_original_inputs(block, self.config)
            blocks[str(index if double else index - model.num_double_blocks)] = block

    def _build_embedders(self, layers: LayerFactory) -> None:
        model = self.model
        self.img_in = layers.on_tokens(model.in_channels, model.hidden_size)
        self.txt_in = layers.on_tokens(model.text_dim, model.hidden_size)
        self.time_in = MLPEmbedder(model.time_dim, model.hidden_size, layers=layers)
        self.vector_in = MLPEmbedder(model.vec_dim, model.hidden_size, layers=layers)
        if model.guidance_embed:
            self.guidance_in = MLPEmbedder(model.time_dim, model.hidden_size, layers=layers)
        if model.cond_embed:
            self.cond_in = layers.on_tokens(model.cond_channels, model.hidden_size)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output (Megatron's schedules call this)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, inputs: ModelInputs | None, pack: Pack, positions: Tensor | None = None) -> Tensor:
        """Velocity of this rank's video tokens, or the stage's output for the next one.

        Args:
            inputs: token shares; the first stage needs them, others take None.
            pack: whose samples these are.
            positions: [S, 3] token positions in joint order; None takes the pack's.

        Returns:
            [num_video, C] on the last stage, [s + n, H] elsewhere.
        """
        txt, img, vec = self._enter(inputs, pack)
        self._offloaded = OffloadedPass() if self.stage.offload and torch.is_grad_enabled() else None
        rotations = self._rotations(pack.positions if positions is None else positions, pack)
        with self._fp8():
            txt, img = self._run_double_blocks(txt, img, vec, rotations, pack)
            joint = self._run_single_blocks(torch.cat([txt, img]), vec, rotations, pack)
        if not self.post_process:
            return torch.cat([joint, vec])
        result: Tensor = self.final_layer(joint[pack.num_text :], vec, pack.video_runs)
        return result

    def _enter(self, inputs: ModelInputs | None, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
        """Text share, video share and `vec` rows, embedded or received."""
        if not self.pre_process:
            assert self.input_tensor is not None, "a later stage received no tensor; Megatron's schedule calls set_input_tensor first"
            txt, img, vec = self.input_tensor.split([pack.num_text, pack.num_video, pack.num_samples])
            return txt, img, vec
        assert inputs is not None, "the first stage needs its inputs"
        return self.txt_in(inputs.txt), self._embed_img(inputs), self._embed_vec(inputs)

    def _embed_img(self, inputs: ModelInputs) -> Tensor:
        if self.model.cond_embed != (inputs.cond is not None):
            raise ValueError(f"model.cond_embed is {self.model.cond_embed}, but cond is {'missing' if inputs.cond is None else 'given'}")
        img: Tensor = self.img_in(inputs.img)
        return img if inputs.cond is None else img + self.cond_in(inputs.cond)

    def _embed_vec(self, inputs: ModelInputs) -> Tensor:
        if self.model.guidance_embed != (inputs.guidance is not None):
            state = "missing" if inputs.guidance is None else "given"
            raise ValueError(f"model.guidance_embed is {self.model.guidance_embed}, but guidance is {state}")
        dtype = inputs.y_vec.dtype
        vec: Tensor = self.time_in(sinusoidal_embedding(inputs.t, dim=self.model.time_dim).to(dtype))
        if inputs.guidance is not None:
            vec = vec + self.guidance_in(sinusoidal_embedding(inputs.guidance, dim=self.model.time_dim).to(dtype))
        return vec + self.vector_in(inputs.y_vec)

    def _rotations(self, positions: Tensor, pack: Pack) -> StreamRotations:
        dtype = torch.float64 if self.config.params_dtype == torch.float64 else torch.float32
        joint = rotation_of(positions, axes_dim=self.model.axes_dim, theta=self.model.rope_theta, dtype=dtype)
        cos, sin = (pack.split_streams(table) for table in joint)
        return StreamRotations(joint=joint, txt=Rotation(cos[0], sin[0]), img=Rotation(cos[1], sin[1]))

    def _run_double_blocks(self, txt: Tensor, img: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> tuple[Tensor, Tensor]:
        for block in self.double_blocks.values():

            def run(txt_: Tensor, img_: Tensor, vec_: Tensor, block: nn.Module = block) -> tuple[Tensor, Tensor]:
                result: tuple[Tensor, Tensor] = block(txt_, img_, vec_, rotations, pack)
                return result

            txt, img = self._run(run, block, txt, img, vec)
        return txt, img

    def _run_single_blocks(self, joint: Tensor, vec: Tensor, rotations: StreamRotations, pack: Pack) -> Tensor:
        for block in self.single_blocks.values():

            def run(joint_: Tensor, vec_: Tensor, block: nn.Module = block) -> Tensor:
                result: Tensor = block(joint_, vec_, rotations, pack)
                return result

            joint = self._run(run, block, joint, vec)
        return joint

    def _fp8(self) -> AbstractContextManager[object]:
        """One context around all blocks: delayed scaling reduces its maxima whenever the outermost context ends."""
        context: AbstractContextManager[object] = get_fp8_context(self.config)
        return context

    def _run(self, run: Callable[..., Any], block: nn.Module, *tensors: Tensor) -> Any:
        """A block on its token shares and `vec`, which comes last."""
        if block not in self._recomputed:
            return run(*tensors)
        keep = partial(keep_inputs_only, run, *tensors, config=self.config, tp_group=self.tp_group)
        if self._offloaded is None:
            return keep()
        of_message = not self.pre_process and block is next(iter(self.double_blocks.values()), None)  # which Megatron holds until then
        with self._offloaded.block(tensors[:-1], stays=of_message or block is self._recomputed[-1]):
            return keep()
