"""All problems of a run at once, each with its cure, before any device is touched. Pure arithmetic on the config."""

from __future__ import annotations

from collections.abc import Iterator

from megasora.config.data_checks import check_buckets, check_start
from megasora.config.errors import UserError
from megasora.config.latent_frames import frame_rule, is_frame_count, nearest_frame_count
from megasora.config.memory import memory_estimate
from megasora.config.memory_cure import H200_BYTES, memory_cure
from megasora.config.number_checks import check_numbers
from megasora.config.optimizer_checks import check_moments
from megasora.config.parameters import modulation_parameters
from megasora.config.problem import Check, Problem
from megasora.config.profile_steps import check_profile
from megasora.config.schema import RunConfig


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _positive(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Sizes the other checks divide by."""
    if world_size < 1:
        yield Problem(field="world size", message=f"is {world_size}", cure="use at least 1 rank")
    sizes = {
        "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        "model": ("hidden_size", "num_attention_heads", "ffn_hidden_size", "in_channels", "patch_size", "text_dim", "vec_dim", "time_dim"),
        "encoders": ("temporal_compression", "spatial_compression"),
    }
    for section, names in sizes.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value < 1:
                yield Problem(field=f"{section}.{name}", message=f"is {value}", cure="use at least 1")
    for name in ("num_double_blocks", "num_single_blocks"):
        if getattr(config.model, name) < 0:
            yield Problem(field=f"model.{name}", message=f"is {getattr(config.model, name)}", cure="use 0 or more")
    if config.model.num_blocks < 1:
        yield Problem(field="model.num_double_blocks", message="the model has no blocks", cure="use at least one block")


def _layout(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    tp, pp, vp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if model.num_attention_heads % tp:
        yield Problem(
            field="parallel.tensor_model_parallel_size",
            message=f"{model.num_attention_heads} heads do not divide by {tp}",
            cure=f"use one of {divisors(model.num_attention_heads)}",
        )
    if world_size % parallel.model_parallel_size:
        yield Problem(
            field="parallel",
            message=f"world size {world_size} is not a multiple of TP x PP x CP = {parallel.model_parallel_size}",
            cure=f"start {parallel.model_parallel_size * max(1, world_size // parallel.model_parallel_size)} ranks or change the sizes",
        )
    if pp * (vp or 1) > model.num_blocks:
        yield Problem(
            field="parallel.pipeline_model_parallel_size",
            message=f"{model.num_blocks} blocks cannot fill {pp * (vp or 1)} chunks (PP x VP)",
            cure=f"use at most {model.num_blocks} chunks",
        )
    if vp is not None and (vp < 2 or pp < 2):
        yield Problem(
            field="parallel.virtual_pipeline_model_parallel_size",
            message=f"interleaving needs PP >= 2 and VP >= 2, got PP {pp} VP {vp}",
            cure="raise PP, or leave VP unset",
        )
    yield from _pipeline_split(config)
    yield from _context(config)


def _pipeline_split(config: RunConfig) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    chunks = parallel.pipeline_model_parallel_size * parallel.num_model_chunks
    given = parallel.pipeline_blocks
    if parallel.pipeline_split == "given":
        if given is None or len(given) != chunks or sum(given) != model.num_blocks or min(given) < 1:
            yield Problem(
                field="parallel.pipeline_blocks",
                message=f"{given} is not {chunks} positive numbers that sum to {model.num_blocks}",
                cure="give one number per chunk (PP x VP), or use pipeline_split flops",
            )
    elif given is not None:
        yield Problem(
            field="parallel.pipeline_blocks",
            message=f"is set, but pipeline_split is {parallel.pipeline_split}",
            cure="use --parallel.pipeline_split given",
        )


def _context(config: RunConfig) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    heads = model.num_attention_heads // tp
    if parallel.context_parallel_backend == "ulysses" and heads % cp:
        yield Problem(
            field="parallel.context_parallel_size",
            message=f"ulysses needs the {heads} heads of a TP rank to divide by CP {cp}",
            cure=f"use one of {divisors(heads)}, or context_parallel_backend auto or ring",
        )
    size = parallel.ulysses_size
    if size is not None:
        if parallel.context_parallel_backend != "ulysses_ring":
            yield Problem(
                field="parallel.ulysses_size",
                message=f"is set, but the backend is {parallel.context_parallel_backend}",
                cure="use context_parallel_backend ulysses_ring",
            )
        elif size < 1 or cp % size or heads % size:
            yield Problem(
                field="parallel.ulysses_size",
                message=f"{size} must divide CP ({cp}) and the heads of a TP rank ({heads})",
                cure=f"use one of {[d for d in divisors(cp) if heads % d == 0]}",
            )


def _model(config: RunConfig, world_size: int) -> Iterator[Problem]:
    model, tp = config.model, max(1, config.parallel.tensor_model_parallel_size)
    if model.hidden_size % model.num_attention_heads:
        yield Problem(
            field="model.hidden_size",
            message=f"{model.hidden_size} is not a multiple of {model.num_attention_heads} heads",
            cure="change one of them",
        )
    elif sum(model.axes_dim) != model.head_dim or any(dim % 2 for dim in model.axes_dim):
        yield Problem(
            field="model.axes_dim",
            message=f"{model.axes_dim} must be even and sum to the head size {model.head_dim}",
            cure="FLUX uses K/8, 7K/16, 7K/16",
        )
    if model.ffn_hidden_size % tp:
        yield Problem(field="model.ffn_hidden_size", message=f"{model.ffn_hidden_size} does not divide by TP {tp}", cure="change TP")
    if model.in_channels % model.patch_size**2:
        yield Problem(
            field="model.in_channels",
            message=f"{model.in_channels} is not a multiple of patch_size^2 = {model.patch_size**2}",
            cure="use latent channels x patch_size^2",
        )


def _schedule(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel, data = config.parallel, config.data
    vp, pp = parallel.virtual_pipeline_model_parallel_size, parallel.pipeline_model_parallel_size
    if data.num_microbatches < 1:
        yield Problem(field="data.num_microbatches", message=f"is {data.num_microbatches}", cure="use at least 1")
    if vp is not None and data.num_microbatches % pp:
        yield Problem(
            field="data.num_microbatches",
            message=f"{data.num_microbatches} is not a multiple of PP {pp}, which interleaving needs",
            cure=f"use {max(1, -(-data.num_microbatches // pp)) * pp}",
        )
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        yield Problem(
            field="parallel.overlap_param_gather", message="needs overlap_grad_reduce", cure="add --parallel.overlap_grad_reduce True"
        )
    counts = (parallel.recompute_double_blocks, parallel.recompute_single_blocks)
    needs = {"count": max(counts) > 0, "selective": True}.get(parallel.recompute, max(counts) == 0)
    if not needs or min(counts) < 0:
        yield Problem(
            field="parallel.recompute",
            message=f"recompute={parallel.recompute} with counts {counts}",
            cure="give recompute=count (or selective) and at least one positive count, or none",
        )
    if parallel.offload == "inputs" and parallel.recompute != "full" and max(counts) <= 0:
        yield Problem(
            field="parallel.offload",
            message=f"takes the inputs of blocks that are recomputed in full, and recompute={parallel.recompute} has none",
            cure="add --parallel.recompute full, or leave out --parallel.offload",
        )


def _precision(config: RunConfig, world_size: int) -> Iterator[Problem]:
    precision = config.precision
    if config.device == "cpu":
        for name, value, bad in (
            ("fp8", precision.fp8, precision.fp8 != "none"),
            ("provider", precision.provider, precision.provider == "te"),
            ("attention", precision.attention, precision.attention in ("te", "flash")),
        ):
            if bad:
                yield Problem(field=f"precision.{name}", message=f"{value} needs CUDA, the device is the CPU", cure="use its CPU default")
    if precision.fp8 != "none":
        if precision.dtype != "bf16":
            yield Problem(
                field="precision.fp8", message=f"FP8 layers take bf16 inputs, dtype is {precision.dtype}", cure="use --precision.dtype bf16"
            )
        if precision.provider == "local":
            yield Problem(
                field="precision.fp8", message="the local provider has no FP8 (Megatron-core would ignore it)", cure="use provider te"
            )
        if precision.fp8 == "delayed":
            yield Problem(
                field="precision.fp8",
                message="delayed scaling keeps scales from step to step that a checkpoint does not hold; a restart would get them wrong",
                cure="use tensorwise, which takes each scale from the tensor itself",
            )
        if precision.fp8 == "mxfp8":
            yield Problem(field="precision.fp8", message="mxfp8 needs a Blackwell GPU", cure="on Hopper use tensorwise or blockwise")
        tp = config.parallel.tensor_model_parallel_size
        for name in ("hidden_size", "ffn_hidden_size"):
            if getattr(config.model, name) % (16 * tp):
                yield Problem(
                    field=f"model.{name}",
                    message=f"{getattr(config.model, name)} / TP {tp} is not a multiple of 16, which FP8 matrices need",
                    cure="change the size or TP, or use fp8 none",
                )


def _zero(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What ZeRO-2 and ZeRO-3 do not go with."""
    parallel = config.parallel
    if parallel.zero_stage == 1:
        return
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, name):
            yield Problem(
                field=f"parallel.{name}",
                message=f"is Megatron's, for zero_stage 1; zero_stage {parallel.zero_stage} overlaps by itself",
                cure=f"leave out --parallel.{name}",
            )


def _data(config: RunConfig, world_size: int) -> Iterator[Problem]:
    data, condition = config.data, config.condition
    weights = {name: getattr(condition, name) for name in condition.__dataclass_fields__}
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        yield Problem(field="condition", message=f"weights {weights} must be non-negative with a positive sum", cure="set condition.t2v 1")
    if not config.model.cond_embed and any(weight > 0 for kind, weight in weights.items() if kind != "t2v"):
        yield Problem(field="condition", message="image conditions need model.cond_embed", cure="set the other weights to 0")
    ratio, causal = config.encoders.temporal_compression, config.encoders.causal
    bad = [n for n in data.frame_counts if not is_frame_count(n, compression=ratio, causal=causal)]
    if bad or not data.frame_counts:
        yield Problem(
            field="data.frame_counts",
            message=f"{bad or 'empty'}: counts are {frame_rule(compression=ratio, causal=causal)}",
            cure=f"for example {ratio * 8 + causal}",
        )
    for name in ("dropout_t5", "dropout_clip"):
        if not 0 <= getattr(data, name) <= 1:
            yield Problem(field=f"data.{name}", message=f"{getattr(data, name)} is no probability", cure="use 0 to 1")
    if data.global_tokens < 1:
        yield Problem(field="data.global_tokens", message=f"is {data.global_tokens}", cure="use at least the tokens of one sample")
    if not data.decode_timeout_s > 0:
        yield Problem(field="data.decode_timeout_s", message=f"is {data.decode_timeout_s}", cure="use a positive number of seconds")
    if data.max_pack_tokens is not None and data.max_pack_tokens < 1:
        yield Problem(
            field="data.max_pack_tokens", message=f"is {data.max_pack_tokens}", cure="use at least the tokens of one sample, or none"
        )
    for name in ("image_weight", "video_weight"):
        if not 0 <= getattr(data, name) <= 1000:
            yield Problem(field=f"data.{name}", message=f"is {getattr(data, name)}", cure="use 0 (never) to 1000 times per epoch")
    if data.resolution_mix and (any(weight < 0 for _, weight in data.resolution_mix) or not any(w for _, w in data.resolution_mix)):
        yield Problem(
            field="data.resolution_mix", message="has a negative weight or none above 0", cure="give each class its weight, such as 0.7"
        )
    if len({name for name, _ in data.resolution_mix}) < len(data.resolution_mix):
        yield Problem(field="data.resolution_mix", message="names a class twice", cure="give each class once")


def _cache(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Clips that are measured or shown are encoded and decoded, whatever is cached; `tiny` makes encoders when none are given."""
    evaluation = config.evaluation
    missing = [name for name in ("vae", "t5", "clip") if getattr(config.encoders, name) is None]
    if config.data.cache is None or config.recipe == "tiny" or not missing:
        return
    flags = " ".join(f"--encoders.{name} FOLDER" for name in missing)
    for name, what, wanted in (
        ("sample_interval_steps", "sample clips need", evaluation.sample_interval_steps > 0),
        ("interval_steps", "the held-out loss needs", evaluation.interval_steps > 0 and config.data.eval_manifest is not None),
    ):
        if wanted:
            yield Problem(
                field=f"evaluation.{name}",
                message=f"{what} encoders beside data.cache",
                cure=f"add {flags}, or --evaluation.{name} 0",
            )


def _tiles(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Tiles and their overlap are whole latent pixels, so that encoding and decoding cut at the same places."""
    encoders = config.encoders
    if encoders.tile_size < 0 or encoders.tile_size % encoders.spatial_compression:
        nearest = max(1, round(encoders.tile_size / encoders.spatial_compression)) * encoders.spatial_compression
        yield Problem(
            field="encoders.tile_size",
            message=f"{encoders.tile_size} is no multiple of the {encoders.spatial_compression} pixels of a latent pixel",
            cure=f"use {nearest}, or 0 for no tiles",
        )
    elif not 0 <= encoders.tile_overlap < 1 or (encoders.tile_size // encoders.spatial_compression * encoders.tile_overlap) % 1:
        yield Problem(
            field="encoders.tile_overlap",
            message=f"{encoders.tile_overlap} of {encoders.tile_size} pixels is no whole number of latent pixels below the tile",
            cure="use 0.25",
        )
    if encoders.parallel == "slabs" and encoders.parallel_axis == "time" and encoders.causal:
        yield Problem(
            field="encoders.parallel_axis",
            message="is time, and a causal autoencoder is not split in time: its frame 0 stands alone in every layer",
            cure="use height, or encoders.parallel tiles",
        )
    if encoders.hold_given:
        reasons = {
            "a causal autoencoder's latent frame of a picture is one frame": encoders.causal,
            "cached latents are of clips as they are": config.data.cache is not None,
            "the held-out loss takes clips as they are": config.evaluation.interval_steps > 0,
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            yield Problem(field="encoders.hold_given", message=reason, cure="leave it out")
    ratio, frames = encoders.temporal_compression, encoders.tile_frames
    if not frames:
        return
    if encoders.causal:
        yield Problem(
            field="encoders.tile_frames",
            message=f"is {frames}: a causal autoencoder takes clips whole in time",
            cure="use 0",
        )
    elif frames < 0 or frames % ratio or not 0 < encoders.tile_overlap < 1 or (frames // ratio * encoders.tile_overlap) % 1:
        # without an overlap a last latent frame would stand alone, and come back as one frame
        yield Problem(
            field="encoders.tile_frames",
            message=f"{frames} frames, and {encoders.tile_overlap} of them, are no whole numbers of {ratio} frames above 0",
            cure="use 32 with encoders.tile_overlap 0.25, or 0 for no windows",
        )


def _sample(config: RunConfig, world_size: int) -> Iterator[Problem]:
    if config.evaluation.sample_interval_steps and not config.evaluation.sample_prompts:
        yield Problem(
            field="evaluation.sample_prompts",
            message="is empty, but sample_interval_steps is set",
            cure='add --evaluation.sample_prompts "A cat" "A dog"',
        )
    if config.sample.guidance_parallel not in (1, 2, 3):
        yield Problem(
            field="sample.guidance_parallel", message=f"{config.sample.guidance_parallel} is not 1, 2 or 3", cure="use 3 with given frames"
        )
    if not 0 <= config.sample.reuse_threshold < 1:
        yield Problem(
            field="sample.reuse_threshold", message=f"is {config.sample.reuse_threshold}", cure="use 0 (off) to 0.2; 0.05 is a good start"
        )
    unit = config.encoders.spatial_compression * config.model.patch_size
    for name in ("height", "width"):
        if getattr(config.sample, name) % unit or getattr(config.sample, name) < unit:
            yield Problem(
                field=f"sample.{name}",
                message=f"{getattr(config.sample, name)} is not a multiple of {unit}",
                cure=f"use {max(1, round(getattr(config.sample, name) / unit)) * unit}",
            )
    ratio, causal = config.encoders.temporal_compression, config.encoders.causal
    if not is_frame_count(config.sample.num_frames, compression=ratio, causal=causal):
        yield Problem(
            field="sample.num_frames",
            message=f"{config.sample.num_frames} is not {frame_rule(compression=ratio, causal=causal)}",
            cure=f"use {nearest_frame_count(config.sample.num_frames, compression=ratio, causal=causal)}",
        )


def _memory(config: RunConfig, world_size: int, gpu_bytes: float) -> Iterator[Problem]:
    """Of a run that is sound otherwise: the estimate divides by its sizes."""
    if config.device == "cpu":
        return
    estimate = memory_estimate(config, world_size=world_size)
    if estimate.total <= gpu_bytes:
        return
    name, most = next(iter(estimate.parts().items()))
    state = name in ("weights", "gradients", "optimizer", "ema")
    modulation = f" ({modulation_parameters(config.model) / 1e9:.2f} B parameters are modulation, sharded over TP)"
    yield Problem(
        field="parallel",
        message=f"the fullest GPU needs {estimate.total / 1e9:.0f} GB, of which {name.replace('_', ' ')} {most / 1e9:.0f} GB, and has "
        f"{gpu_bytes / 1e9:.0f} GB{modulation if state else ''}",
        cure=memory_cure(config, world_size=world_size, gpu_bytes=gpu_bytes),
    )


def _trained(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What a model must be to be trained here."""
    if config.model.guidance_embed:
        yield Problem(
            field="model.guidance_embed",
            message="is on, and training gives no distilled guidance (nor does Open-Sora 2.0's)",
            cure="leave it out: guidance_in of FLUX.1-dev's weights is then dropped",
        )


CHECKS: tuple[Check, ...] = (
    _layout,
    _model,
    _schedule,
    _precision,
    _zero,
    check_moments,
    _data,
    check_buckets,
    _cache,
    _tiles,
    check_numbers,
    check_profile,
    check_start,
    _sample,
)


def problems(
    config: RunConfig, *, world_size: int, check_memory: bool = True, gpu_bytes: float = H200_BYTES, training: bool = True
) -> list[Problem]:
    """Everything that cannot work, in schema order; empty when the run is sound. A size below 1 hides the checks that divide by it; memory
    is asked about a run that is sound otherwise.

    Args:
        config: the run.
        world_size: ranks of the job.
        check_memory: whether to compare the estimate with a GPU's memory; off while it is open whether there is a GPU.
        gpu_bytes: that memory.
        training: whether the model is trained; one that only draws clips may be of more kinds.
    """
    sizes = list(_positive(config, world_size))
    found = sizes or [problem for check in (*CHECKS, *([_trained] if training else [])) for problem in check(config, world_size)]
    return found or (list(_memory(config, world_size, gpu_bytes)) if check_memory else [])


def raise_on_problems(
    config: RunConfig, *, world_size: int, check_memory: bool = True, gpu_bytes: float = H200_BYTES, training: bool = True
) -> None:
    """Refuse a run that cannot work; the arguments are those of `problems`.

    Raises:
        UserError: one line per problem, each with its cure.
    """
    found = problems(config, world_size=world_size, check_memory=check_memory, gpu_bytes=gpu_bytes, training=training)
    if found:
        raise UserError(str(found[0]) if len(found) == 1 else "\n  ".join([f"{len(found)} problems", *map(str, found)]))
