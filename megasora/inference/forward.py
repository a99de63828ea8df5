"""`megasora forward`: one forward of given weights on given inputs in any layout, to be compared with anything else.

Each sample of the batch is a pack and a micro-batch of its own, so all token counts work in all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.safetensors_io import SafetensorsReader, write_safetensors
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megasora.config.validate import problems
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.model import MMDiT, ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.models.mmdit.weights import collect, fill_parameters
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape


@dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """A batch as diffusers takes it."""

    img: Tensor
    """[B, N, C]"""
    img_ids: Tensor
    """[B, N, 3]"""
    txt: Tensor
    """[B, L, D]"""
    txt_ids: Tensor
    """[B, L, 3]"""
    timesteps: Tensor
    """[B] in [0, 1]"""
    y_vec: Tensor
    """[B, V]"""
    guidance: Tensor | None
    cond: Tensor | None


def run_forward(
    *,
    weights: Path,
    inputs: Path,
    output: Path,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    vp: int | None = None,
    grads: Path | None = None,
    axes_dim: tuple[int, int, int] | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    context_parallel_backend: str = "auto",
) -> None:
    """Read, run, write.

    Raises:
        UserError: files or layout do not fit.
    """
    target_device = groups.choose_device(device)
    groups.start_world(target_device, timeout_minutes=30)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_backend=context_parallel_backend,  # type: ignore[arg-type]
    )
    if dist.get_world_size() != parallel.model_parallel_size:
        raise UserError(
            f"forward runs one replica: TP x PP x CP = {parallel.model_parallel_size}, but {dist.get_world_size()} rank(s) were started; "
            f"use torchrun --nproc-per-node {parallel.model_parallel_size}"
        )
    source = open_source(weights, axes_dim=axes_dim)
    model = source.model
    _check(model, parallel)
    batch = read_inputs(inputs, model=model)
    context = groups.initialize(parallel, device=target_device, num_attention_heads=model.num_attention_heads, seed=0)
    precision = PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32")
    chunks, config = build_chunks(model, parallel, precision, context=context)
    fill_parameters(chunks, source.read, known=source.shapes, model=model, context=context)
    prediction, gradients = predict(chunks, batch, config=config, model=model, context=context, with_gradients=grads is not None)
    if context.rank == 0:
        write_safetensors(output, {"pred": prediction}, metadata={"format": "pt"})
        if grads is not None:
            write_safetensors(grads, gradients, metadata={"format": "pt"})


def _check(model: ModelConfig, parallel: ParallelConfig) -> None:
    found = [
        problem
        for problem in problems(
            RunConfig(recipe="forward", model=model, parallel=parallel, device="cpu"),
            world_size=parallel.model_parallel_size,
            training=False,
        )
        if problem.field.startswith(("parallel", "model"))
    ]
    if found:
        raise UserError("; ".join(map(str, found)))


def read_inputs(path: Path, *, model: ModelConfig) -> ForwardInputs:
    """Inputs of a forward, checked against the model.

    Raises:
        UserError: a tensor is missing, superfluous or has another shape.
    """
    reader = SafetensorsReader(path)
    tensors = {key: reader.read(key) for key in reader.keys()}
    wanted = {"img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec"}
    wanted |= {"guidance"} if model.guidance_embed else set()
    wanted |= {"cond"} if model.cond_embed else set()
    if tensors.keys() != wanted:
        raise UserError(
            f"{path}: missing {sorted(wanted - tensors.keys()) or 'nothing'}, superfluous {sorted(tensors.keys() - wanted) or 'nothing'}; "
            f"this model takes {', '.join(sorted(wanted))}"
        )
    n, length, batch = tensors["img"].shape[1], tensors["txt"].shape[1], tensors["img"].shape[0]
    shapes = {
        "img": (batch, n, model.in_channels),
        "img_ids": (batch, n, 3),
        "txt": (batch, length, model.text_dim),
        "txt_ids": (batch, length, 3),
        "timesteps": (batch,),
        "y_vec": (batch, model.vec_dim),
        "guidance": (batch,),
        "cond": (batch, n, model.cond_channels),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    return ForwardInputs(**{name: tensors.get(name) for name in ForwardInputs.__dataclass_fields__})  # type: ignore[arg-type]


def predict(
    chunks: list[MMDiT],
    batch: ForwardInputs,
    *,
    config: TransformerConfig,
    model: ModelConfig,
    context: ParallelContext,
    with_gradients: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(prediction [B, N, C] fp32 on every rank, gradients of mean(pred^2) by release key)."""
    count, tokens, channels = batch.img.shape
    stages = context.topology.pp if context.topology.vp else 1
    padded = max(-(-count // stages) * stages, stages)
    batches = [_microbatch(batch, min(place, count - 1), place < count, config=config, context=context) for place in range(padded)]
    places = {id(micro): place for place, micro in enumerate(batches)}
    prediction = torch.zeros(count, tokens, channels, device=context.device)

    def loss_function(output: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        place = places[id(micro)]
        shares, numbers = micro.pack.video_tokens_of(0)
        own = output.index_select(0, shares).float()
        if place < count:
            prediction[place, numbers] = own.detach()
        counted = 1 if place < count and context.at.cp == 0 else 0
        loss = own.square().sum() / (tokens * channels) * (1.0 if place < count else 0.0)
        return loss, torch.tensor(counted, dtype=torch.int32, device=output.device), loss.detach()

    gradients: dict[str, Tensor] = {}
    if with_gradients:
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True)
        wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=context.pg_collection) for chunk in chunks]
        config.finalize_model_grads_func = finalize_model_grads
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_schedule(wrapped, batches, config=config, context=context, loss_function=loss_function)
        gradients = collect(chunks, _main_grad, shapes=canonical_shapes(model), model=model, context=context)
    else:
        with torch.no_grad():
            run_schedule(chunks, batches, config=config, context=context, loss_function=loss_function, forward_only=True)
    dist.all_reduce(prediction)
    return prediction.cpu(), {key: gradient.cpu() for key, gradient in gradients.items()}


def _microbatch(batch: ForwardInputs, place: int, real: bool, *, config: TransformerConfig, context: ParallelContext) -> MicroBatch:
    """Sample `place` as a pack of its own; `real` is False for repeats that only fill the schedule."""
    at, topology, device = context.at, context.topology, context.device
    dtype = config.params_dtype
    shape = SampleShape(text_tokens=batch.txt.shape[1], grid=(1, 1, batch.img.shape[1]))
    pack = Pack([shape], split=PackSplit(tp=topology.tp, cp=topology.cp), tp_rank=at.tp, cp_rank=at.cp, device=device)
    stream = torch.zeros(pack.text_length + pack.video_length, 3, dtype=torch.float64)
    stream[: shape.text_tokens] = batch.txt_ids[place].double()
    stream[pack.text_length : pack.text_length + shape.video_tokens] = batch.img_ids[place].double()
    inputs = None
    if at.pp == 0:
        inputs = ModelInputs(
            img=_share(batch.img[place], pack, text=False).to(device, dtype),
            txt=_share(batch.txt[place], pack, text=True).to(device, dtype),
            t=batch.timesteps[place : place + 1].float().to(device),
            y_vec=batch.y_vec[place : place + 1].to(device, dtype),
            cond=None if batch.cond is None else _share(batch.cond[place], pack, text=False).to(device, dtype),
            guidance=None if batch.guidance is None else batch.guidance[place : place + 1].float().to(device),
        )
    return MicroBatch(
        pack=pack,
        inputs=inputs,
        target=None,
        weight=None,
        num_counted=int(real),
        positions=stream[pack.joint_stream_index([at.cp])].to(device),
    )


def _share(tokens: Tensor, pack: Pack, *, text: bool) -> Tensor:
    """This rank's rows of a one-sample stream, zeros for dummy tokens."""
    places, numbers = pack.text_tokens_of(0) if text else pack.video_tokens_of(0)
    share = torch.zeros(pack.num_text if text else pack.num_video, tokens.shape[1], dtype=tokens.dtype)
    share[places.cpu()] = tokens[numbers.cpu()]
    return share


def _main_grad(parameter: Tensor) -> Tensor:
    """The reduced gradient Megatron's DDP keeps beside a parameter."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
