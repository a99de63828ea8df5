"""The schema of a run: frozen, keyword-only dataclasses, one per part that owns the knobs.

A recipe (`megasora.recipes`) returns a `RunConfig`; the command line overrides its fields; `config.io` writes and reads it
strictly; `config.validate` returns every problem at once. Nothing here touches torch, a device or a file.
The string under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megasora.config.survival import CheckpointConfig as CheckpointConfig
from megasora.config.survival import GuardConfig as GuardConfig
from megasora.config.survival import RecoveryConfig as RecoveryConfig

Dtype = Literal["fp32", "bf16"]
MomentDtype = Literal["fp32", "bf16", "fp16"]
Fp8 = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]
Sharing = Literal["none", "tiles", "slabs"]
SlabAxis = Literal["time", "height"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the MMDiT. The defaults are Open-Sora v2 (11.89 B); source: hpcaitech/Open-Sora configs/diffusion/train/image.py."""

    hidden_size: int = 3072
    """Width H of the token stream."""
    num_attention_heads: int = 24
    """Attention heads N; the head size is hidden_size / num_attention_heads."""
    num_double_blocks: int = 19
    """Double-stream blocks (separate weights for text and video); they come first."""
    num_single_blocks: int = 38
    """Single-stream blocks (shared weights); they come after the double blocks."""
    ffn_hidden_size: int = 12288
    """Width of the feed-forward layers (4 H)."""
    in_channels: int = 64
    """Channels of one video token: latent channels x patch_size^2 (16 x 4 for the 4x8x8 VAE, 128 x 1 for the DC-AE)."""
    patch_size: int = 2
    """Side of the square of latent pixels folded into one token."""
    text_dim: int = 4096
    """Channels of one text embedding (T5-XXL: 4096)."""
    vec_dim: int = 768
    """Channels of the pooled text embedding (CLIP-L: 768)."""
    time_dim: int = 256
    """Channels of the sinusoidal embedding of t (and of guidance)."""
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    """Rotary dims of one head given to the (time, height, width) axes; they sum to the head size."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    guidance_embed: bool = False
    """Whether the model takes a distilled guidance scale (FLUX.1-dev does, Open-Sora v2 does not)."""
    cond_embed: bool = True
    """Whether the model takes an image/video condition through `cond_in` (Open-Sora v2 does, FLUX does not)."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm and of the query/key RMSNorm."""

    @property
    def head_dim(self) -> int:
        """Channels K of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_blocks(self) -> int:
        """Blocks of both kinds."""
        return self.num_double_blocks + self.num_single_blocks

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latent."""
        return self.in_channels // self.patch_size**2

    @property
    def cond_channels(self) -> int:
        """Channels of the condition token: the patchified [mask, masked latent]."""
        return self.in_channels + self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model replica is spread over ranks, and what is recomputed."""

    tensor_model_parallel_size: int = 1
    """TP: ranks that share each layer. Above 1 sequence parallelism is always on."""
    pipeline_model_parallel_size: int = 1
    """PP: stages that share the list of blocks."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VP: model chunks per stage (interleaved schedule); None means one chunk, 1F1B."""
    context_parallel_size: int = 1
    """CP: ranks that share the tokens of each sample inside attention."""
    context_parallel_backend: Literal["auto", "ulysses", "ring", "ulysses_ring"] = "auto"
    """ulysses: all-to-all over heads; ring: keys and values travel; ulysses_ring: both; auto: ulysses where the heads of a TP rank
    divide by CP, otherwise the largest ulysses factor times ring."""
    ulysses_size: int | None = None
    """Ulysses factor of context_parallel_size for ulysses_ring; None picks the largest that divides the heads of a TP rank."""
    pipeline_split: Literal["flops", "parameters", "memory", "given"] = "flops"
    """What the stages are balanced by; `given` takes pipeline_blocks."""
    pipeline_blocks: tuple[int, ...] | None = None
    """Blocks per model chunk in pipeline order, length PP x VP, for pipeline_split=given."""
    recompute: Literal["none", "selective", "full", "count"] = "none"
    """Activation recomputation. none: every block keeps all it computed; selective: matrix products and attention (norms, modulation,
    gates, GELU are computed again: little time); full: its inputs alone (every block runs twice); count: the first N blocks of each kind
    in every chunk of a stage are recomputed in full, the others keep all."""
    recompute_double_blocks: int = 0
    """Double blocks per chunk recomputed in full when recompute is count (or selective, which then treats the others)."""
    recompute_single_blocks: int = 0
    """Single blocks per chunk recomputed in full when recompute is count (or selective, which then treats the others)."""
    offload: Literal["none", "inputs"] = "none"
    """inputs: what blocks that are recomputed in full keep waits in page-locked host memory for their backward pass, copied while blocks
    compute; a chunk's last one stays on the GPU. Needs recompute full, or counts."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DP x CP ranks share out: 1 the optimizer's state (Megatron's distributed optimizer), 2 gradients too, 3 parameters too, gathered
    block by block (torch's FSDP2)."""
    overlap_grad_reduce: bool | None = None
    """Overlap the data-parallel gradient reduction with the backward pass; None: on CUDA when DP x CP > 1."""
    overlap_param_gather: bool | None = None
    """Overlap the distributed optimizer's (ZeRO-1) parameter gather with the forward pass (needs overlap_grad_reduce);
    None: where the gradient reduction overlaps by itself."""
    timeout_minutes: float = 30.0
    """How long a collective may wait before the job is ended."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def microbatch_multiple(self) -> int:
        """Micro-batches come in multiples of this: PP when interleaved."""
        return self.pipeline_model_parallel_size if self.virtual_pipeline_model_parallel_size else 1

    @property
    def num_model_chunks(self) -> int:
        """Model chunks a rank holds (VP, or 1)."""
        return self.virtual_pipeline_model_parallel_size or 1


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats and layer providers."""

    dtype: Dtype = "bf16"
    """Parameters and activations; bf16 keeps fp32 master weights and reduces gradients in fp32."""
    fp8: Fp8 = "none"
    """FP8 recipe of Transformer Engine for the linear layers of the blocks (Megatron's names)."""
    provider: Literal["auto", "te", "local"] = "auto"
    """Layers: Transformer Engine or Megatron-core's own; auto takes te on CUDA when it is installed, local on CPU."""
    attention: Literal["auto", "te", "flash", "torch"] = "auto"
    """Attention kernel. auto on CUDA in bf16: torch's cuDNN kernel for packs of equally long samples, else te or flash, the first that is
    installed; torch elsewhere."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What computes norms, gates, rotations and changes of order between matrix products: Triton (one pass each), torch; auto by device."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are trained on, and how a step is filled."""

    manifest: str | None = None
    """csv or parquet table of clips (columns path, text, num_frames, height, width, aspect_ratio, resolution, fps, ...)."""
    eval_manifest: str | None = None
    """Held-out clips for the validation loss; None turns it off."""
    cache: str | None = None
    """Folder written by `megasora data encode`: latents and text are read from it instead of decoding and encoding the clips."""
    global_tokens: int = 1_000_000
    """A step takes the next samples of the epoch until one more would exceed this many tokens (text and video)."""
    num_microbatches: int = 1
    """Packs per data-parallel replica and step (M); raised to a multiple of PP when interleaved."""
    max_pack_tokens: int | None = None
    """Most tokens of a pack, over its TP x CP ranks (a memory limit); steps that need it take more micro-batches. None sets no limit."""
    resolution: str = "256px"
    """Resolution class whose sizes are used: '256px' (256 x 256 pixels in every aspect) or '480p' (480 lines of 16:9), any number;
    'manifest' for the clips' own sizes rounded down; 'mix' where bucket_mix says which."""
    resolution_mix: tuple[tuple[str, float], ...] = ()
    """(class, weight) pairs instead of `resolution`: each time a clip is taken, its class is drawn among those that do not enlarge it."""
    buckets: Literal["nearest", "published"] = "nearest"
    """How a clip gets its size, frame count and frames. nearest: the nearest aspect in ratio, frames at the exact stride, the smallest
    class takes clips of any size. published: Open-Sora's rule (opensora/datasets/{aspect,bucket,utils}.py): the aspect class with the
    nearest height / width, num_frames // stride frames there to choose from, frames spread evenly over count x stride, and no clip of fewer
    than 0.8 x the class's pixels."""
    bucket_mix: tuple[tuple[str, int, float, float], ...] = ()
    """(class, frames, probability, skip) of Open-Sora's bucket_config, with resolution mix and buckets published: each time a clip is taken
    the classes are tried by descending pixels. An image stays with `probability`. A clip tries the frame counts it fills by descending
    count: it moves on to the next count with `skip` (0 draws nothing), else stays with `probability`, else leaves the class. A clip that no
    class keeps is left out this time."""
    image_weight: float = 1.0
    """Times an image is taken per epoch, on average (2.5: twice or three times; 0.5: every other epoch)."""
    video_weight: float = 1.0
    """Times a clip of more than one frame is taken per epoch, on average."""
    frame_counts: tuple[int, ...] = (129, 97, 65, 33, 1)
    """Allowed frame counts, longest first; a clip takes the longest it can fill. With bucket_mix, which of its entries are used."""
    target_fps: float = 24.0
    """Clips are strided by the smallest whole number that brings them to at most this rate (Open-Sora's fps_max)."""
    temporal_start: Literal["first", "random"] = "first"
    """Where in a longer clip its frames begin: at its first, or drawn each time it is taken (Open-Sora temporal_random_crop); in a cache
    of latents once, when it is encoded."""
    text_tokens: int = 512
    """Length L of the text embedding (padded, no mask)."""
    decoder: Literal["auto", "pyav", "dali", "mixed"] = "auto"
    """pyav (CPU, everything) or dali (GPU: NVDEC; CPU: VP8, VP9, MJPEG); auto: dali on CUDA when installed, else pyav, for every file.
    mixed: dali for the files whose codec it decodes on this device, pyav for the others; their pixels differ by a level or so."""
    decode_workers: int = 2
    """Threads that decode ahead of the step on each rank."""
    decode_timeout_s: float = 120.0
    """A clip that takes longer is skipped (weight 0), and a thread that hangs in it is replaced."""
    quarantine_after: int = 3
    """Failures, over epochs and restarts, after which a clip is not decoded any more (its step is a clip short); 0 tries for ever."""
    prefetch_steps: int = 2
    """Steps whose clips are decoded ahead."""
    encode_ahead: bool | None = None
    """Encode or read the next step's clips in a thread, on a CUDA stream of its own, while a step trains (encoders and model then need
    memory together). None: on CUDA; on the CPU the thread would take the cores that train."""
    dropout_t5: float = 0.31622777
    """Probability that a sample trains without its T5 text. Open-Sora configs/diffusion/train: dropout_ratio t5."""
    dropout_clip: float = 0.31622777
    """Probability that a sample trains without its CLIP vector, independent of dropout_t5."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """How image/video conditions are drawn; weights need not sum to one. Source: Open-Sora configs/diffusion/train/stage2_i2v.py."""

    t2v: float = 1.0
    """Weight of text-only samples."""
    i2v_head: float = 0.0
    """Weight of samples conditioned on their first frame."""
    i2v_loop: float = 0.0
    """Weight of samples conditioned on first and last frame."""
    i2v_tail: float = 0.0
    """Weight of samples conditioned on their last frame."""
    v2v_head: float = 0.0
    """Weight of samples conditioned on their first 33 frames (32 where encoders.causal is False)."""
    v2v_tail: float = 0.0
    """Weight of samples conditioned on their last 33 frames (32 where encoders.causal is False)."""
    v2v_head_easy: float = 0.0
    """Weight of samples conditioned on their first 65 frames (64 where encoders.causal is False)."""
    v2v_tail_easy: float = 0.0
    """Weight of samples conditioned on their last 65 frames (64 where encoders.causal is False)."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching: how training pairs are drawn."""

    sigma_min: float = 1e-5
    """Noise left at t = 0. Open-Sora scripts/diffusion/train.py:354."""
    shift_points: tuple[tuple[float, float], tuple[float, float]] = ((256.0, 1.0), (4096.0, 3.0))
    """Two points (tokens, shift) of the line that gives the spatial shift. FLUX util.sampling.get_lin_function."""
    temporal_shift: bool = True
    """Multiply the shift by sqrt(T_lat). Open-Sora scripts/diffusion/train.py."""


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """Autoencoder and text encoders, as local folders in their published formats."""

    vae: str | None = None
    """Folder of an autoencoder of clips: diffusers' AutoencoderKLHunyuanVideo, or a video DC-AE of `megasora convert --to dc-ae`."""
    t5: str | None = None
    """Folder of a T5 encoder (transformers T5EncoderModel) with its spiece.model."""
    clip: str | None = None
    """Folder of a CLIP text model (transformers CLIPTextModel) with its tokenizer."""
    dtype: Dtype = "bf16"
    """Number format of the encoders."""
    posterior: Literal["mean", "sample"] = "mean"
    """Latent that training takes from the autoencoder: the posterior's mean, or a sample drawn anew each time a clip is taken."""
    hold_given: bool = False
    """Where the autoencoder is not causal: encode a training clip of given pictures with each picture held for a whole latent frame, as
    sampling shows it, instead of as it is. Open-Sora utils/train.py: pad, off in its training."""
    temporal_compression: int = 4
    """Video frames per latent frame."""
    causal: bool = True
    """Whether frame 0 has a latent frame of its own (HunyuanVideo: 4k+1 frames) or not (video DC-AE: 4k). Open-Sora: is_causal_vae."""
    spatial_compression: int = 8
    """Pixels per latent pixel."""
    tile_size: int = 256
    """Side in pixels of the square tiles that larger pictures and clips are cut into for the autoencoder; 0 does not cut. Open-Sora
    models/hunyuan_vae: sample_size 256, use_spatial_tiling."""
    tile_frames: int = 0
    """Frames of the windows that longer clips are cut into where the autoencoder is not causal; 0 does not cut. Open-Sora models/dc_ae:
    temporal_tile_size 32, use_temporal_tiling."""
    tile_overlap: float = 0.25
    """Share of a tile's side, and of a window, that it has in common with the next. Open-Sora models/hunyuan_vae: tile_overlap_factor."""
    scaling_factor: float | None = None
    """Training and sampling multiply latents by it; None takes what the autoencoder's folder says. Of the video DC-AE that is 1:
    the released DiT lives on raw latents; Open-Sora's training config says 0.493 to divide by (2.0284 here) and never applies it."""
    parallel: Sharing = "tiles"
    """How ranks share out a clip in `data encode` and sampling: not, by its tiles (one rank's bits), or in slabs of each tile or uncut clip
    along parallel_axis (equal up to rounding). Training's own encoding deals out whole clips."""
    parallel_axis: SlabAxis = "time"
    """What slabs are of; a causal autoencoder's only of height."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule. Source: Open-Sora configs/diffusion/train (HybridAdam; eps 1e-15)."""

    lr: float = 5e-5
    """Peak learning rate."""
    lr_milestones: tuple[tuple[int, float], ...] = ()
    """(step, learning rate) pairs: from that step on the rate is the given one."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-15
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norm scales are not decayed (as Megatron groups them)."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    exp_avg_dtype: MomentDtype = "fp32"
    """Format that Adam's first moment is kept in (2 bytes instead of 4 a parameter and rank that holds it); below fp32 it takes Transformer
    Engine's FusedAdam. Master weights stay fp32. A checkpoint holds fp32 values: a run may go on in another format."""
    exp_avg_sq_dtype: MomentDtype = "fp32"
    """The same of the second moment. bf16 needs beta2 of at most 0.996, fp16 an eps of at least 1e-8."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the fp32 weights; 0 turns EMA off."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What the weights start from."""

    weights: str | None = None
    """Weights of any supported format to start from; ignored with a notice on resume."""
    run: str | None = None
    """Folder of an earlier run whose newest complete checkpoint gives the weights, instead of `weights`; ignored on resume, as they are."""
    run_weights: Literal["auto", "model", "ema"] = "auto"
    """Which weights of that run: the trained ones, or their moving average; auto takes the average where the run kept one."""
    ends: Literal["as_given", "new_if_other"] = "as_given"
    """What becomes of weights whose model has other in_channels, as one of another autoencoder has: as_given refuses them; new_if_other
    lets img_in, cond_in and final_layer.linear start anew and keeps the rest (arXiv 2503.09642 section 4.3.3)."""
    follows: str | None = None
    """Recipe that this stage goes on from; a start from another run or from nothing is said in the log."""
    seed: int = 1024
    """Seed of the random initialisation."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured and shown during training."""

    interval_steps: int = 0
    """Steps between held-out losses (fixed clips, noise and timesteps); 0 turns them off."""
    num_timestep_bins: int = 5
    """The held-out loss is reported at this many evenly spaced timesteps."""
    sample_interval_steps: int = 0
    """Steps between sample clips; 0 turns them off."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample clips."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How clips are generated. Defaults: Open-Sora configs/diffusion/inference/256px.py."""

    height: int = 256
    """Pixels; a multiple of spatial_compression x patch_size."""
    width: int = 256
    """Pixels; a multiple of spatial_compression x patch_size."""
    num_frames: int = 129
    """Frames: 1 or 4k+1; 1 or 4k from 8 on where the autoencoder is not causal."""
    fps: float = 24.0
    """Frames per second of the clip."""
    steps: int = 50
    """Euler steps."""
    guidance: float = 7.5
    """Text guidance g_txt; of a guidance-distilled model (FLUX.1-dev) the scale it is told."""
    guidance_img: float = 3.0
    """Guidance of given frames g_img."""
    text_oscillation: bool = True
    """Keep g_txt in steps < 10 and even ones, use 1 in the others."""
    image_oscillation: bool = True
    """The same for g_img."""
    image_ramp: bool = True
    """For given images (not for given clips), let g_img fall to 1 over the steps and rise from 1 over the latent frames."""
    guidance_parallel: int = 1
    """Replicas of the model that share out the evaluations of a guided step: 3 with given frames, 2 without."""
    flow_shift: float | None = None
    """Shift of the times toward noise; None takes the one that training draws its times with (flow.shift_points, flow.temporal_shift)."""
    prompt_fps: bool = True
    """Append the frame rate to the prompt (`24 FPS.`), as the published weights are asked; nothing is appended for a picture."""
    motion_score: float | None = 4.0
    """Motion score appended to the prompt; None appends nothing."""
    reuse_threshold: float = 0.0
    """Accumulated relative change of the velocity below which a step is extrapolated from the last two; 0 evaluates every step."""
    reuse_check: bool = False
    """With reuse_threshold, also draw the clip without reuse, and record how far the two latents lie apart."""
    seed: int = 42
    """Seed of the noise; the same seed gives the same clip in every layout."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of some steps, by torch.profiler; `megasora study trace` reads them."""

    steps: str | None = None
    """First and last traced step, counted from 1: 10:12. None traces nothing; the steps before the first should include a few warm ones."""
    folder: str | None = None
    """Where each rank writes rank_00000.json.gz; None: profile/ in the run's folder."""
    shapes: bool = False
    """Record the shapes of operators' inputs: larger traces, slower steps."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    steps: int = 10_000
    """Absolute total of optimizer steps, also after a resume."""
    seed: int = 42
    """Seed of sample order, noise, timesteps, dropout and conditions."""
    log_interval_steps: int = 1
    """Steps between log lines on rank 0 (metrics.jsonl always has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (slower on CUDA)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run."""

    recipe: str
    """Name of the recipe this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    init: InitConfig = field(default_factory=InitConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes cuda when there is one."""
    run_dir: str | None = None
    """Folder of the run; None makes runs/<recipe>."""
    resume_data: Literal["exact", "epoch", "restart"] = "exact"
    """Where a run goes on whose data, token budget or seed have changed since its checkpoint: exact refuses, epoch begins the next epoch,
    restart begins with epoch 0; weights, optimizer and step count go on. What has not changed always goes on exactly."""
