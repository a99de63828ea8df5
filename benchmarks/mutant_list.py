"""The mistakes that `mutants.py` plants: realistic slips, each of which some test must notice.

A mutant is one fragment of one file and what stands there instead. `tests` are the ones that should notice, as narrow as possible; a unit
test checks that every fragment still occurs exactly once and that the tests exist.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    """From the root of the tree."""
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Paths or node ids for pytest."""
    equivalent: str | None = None
    """Why no test can notice; None for a mistake that must be noticed."""


CURATION = "tests/unit/curation"
DATA = "tests/unit/data"
DIFFUSION = ("tests/unit/diffusion",)
PLAN = (f"{DATA}/test_plan.py", f"{DATA}/test_sampler.py", f"{DATA}/test_mix.py")
REQUESTS = (f"{DATA}/test_requests.py",)
RULES = (f"{CURATION}/test_rules.py",)
POOL = (f"{CURATION}/test_pyramid_pool.py",)
PYRAMID = (f"{CURATION}/test_pyramid.py",)
CACHE = (f"{DATA}/cache/test_cache.py",)
SHARDS = (f"{DATA}/cache/test_shards.py",)
DECODE = (f"{DATA}/decoding/test_decode.py",)
LOADING = (f"{DATA}/test_loading.py",)
CONFIG = ("tests/unit/config",)
PACK = ("tests/unit/parallel/test_pack.py",)
LORA = ("tests/convert/test_lora.py",)
ENCODERS = ("tests/unit/models/encoders/test_encoders.py",)
LAYOUT = ("tests/unit/models/mmdit/test_layout.py",)
MATHS = ("tests/unit/models/mmdit/test_maths.py",)
RATES = ("tests/unit/training/test_learning_rate.py",)
LOG = ("tests/unit/training/test_metrics_log.py",)
MICROBATCH = ("tests/unit/training/test_microbatch.py",)
PRUNE = ("tests/unit/checkpoint/test_prune.py",)
DRAWS = ("tests/parallel/test_feed_draws.py",)
STEPS = ("tests/parallel/test_optimizer_steps.py",)
STORE = ("tests/parallel/test_store.py",)
BRANCHES = ("tests/parallel/test_sampler_branches.py",)
PARITY = "tests/parallel/test_parity.py::test_uneven_packs_give_the_gradients_of_one_rank"
DIFFUSERS = ("tests/parallel/test_against_diffusers.py::test_forward_and_gradients_agree[1-layout0-False]",)


def _filter(name: str) -> tuple[str, ...]:
    return (f"{CURATION}/test_filter.py::test_{name}",)


def _convert(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_convert.py::test_{name}",)


def _security(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_security.py::test_{name}",)


def _inspect(name: str) -> tuple[str, ...]:
    return (f"tests/convert/test_inspect.py::test_{name}",)


def _parity(name: str) -> tuple[str, ...]:
    return (f"{PARITY}[{name}]",)


_DIFFUSION = (
    Mutant("path without sigma_min", "megasora/diffusion/flow.py", "(1 - (1 - sigma_min) * (1 - t)) * x_1", "t * x_1", DIFFUSION),
    Mutant("velocity without sigma_min", "megasora/diffusion/flow.py", "return (1 - sigma_min) * x_1 - x_0", "return x_1 - x_0", DIFFUSION),
    Mutant(
        "times shifted toward the clean end",
        "megasora/diffusion/flow.py",
        "return shift * t / (1 + (shift - 1) * t)",
        "return t / (shift + (1 - shift) * t)",
        DIFFUSION,
    ),
    Mutant("shift by all latent pixels", "megasora/diffusion/flow.py", "(height * width) // 4 - x_a", "(height * width) - x_a", DIFFUSION),
    Mutant("shift by frames, not their root", "megasora/diffusion/flow.py", "spatial * math.sqrt(frames)", "spatial * frames", DIFFUSION),
    Mutant("training time mirrored", "megasora/diffusion/flow.py", "math.exp(-standard_normal)", "math.exp(standard_normal)", DIFFUSION),
    Mutant("one time too few", "megasora/diffusion/flow.py", "for i in range(steps + 1)]", "for i in range(steps)]", DIFFUSION),
    Mutant(
        "last Euler step dropped", "megasora/diffusion/guidance.py", "zip(times[:-1], times[1:]", "zip(times[:-2], times[1:-1]", DIFFUSION
    ),
    Mutant(
        "guidance scales swapped",
        "megasora/diffusion/guidance.py",
        "nothing + g_img * (image - nothing) + g_txt * (both - image)",
        "nothing + g_txt * (image - nothing) + g_img * (both - image)",
        DIFFUSION,
    ),
    Mutant(
        "unconditional branch with text",
        "megasora/diffusion/guidance.py",
        "nothing = velocity(x, now, False, False)",
        "nothing = velocity(x, now, True, False)",
        DIFFUSION,
    ),
    Mutant(
        "image branch with text",
        "megasora/diffusion/guidance.py",
        "image = velocity(x, now, False, True)",
        "image = velocity(x, now, True, True)",
        DIFFUSION,
    ),
    Mutant(
        "full branch without image",
        "megasora/diffusion/guidance.py",
        "both = velocity(x, now, True, with_image)",
        "both = velocity(x, now, True, False)",
        DIFFUSION,
    ),
    Mutant(
        "two-branch guidance from the wrong base",
        "megasora/diffusion/guidance.py",
        "v = nothing + text_scale * (both - nothing)",
        "v = both + text_scale * (both - nothing)",
        DIFFUSION,
    ),
    Mutant(
        "image guidance does not oscillate",
        "megasora/diffusion/guidance.py",
        "oscillating(g_img, step=step, on=oscillation),",
        "g_img,",
        DIFFUSION,
    ),
    Mutant("Euler runs backward", "megasora/diffusion/guidance.py", "(following - now) * v", "(now - following) * v", DIFFUSION),
    Mutant("condition mask inverted", "megasora/diffusion/conditions.py", "condition[0, place] = 1", "condition[0, place] = 0", DIFFUSION),
    Mutant("condition mask on every frame", "megasora/diffusion/conditions.py", "condition[0, place] = 1", "condition[0] = 1", DIFFUSION),
    Mutant(
        "condition mask on the first given frame only",
        "megasora/diffusion/conditions.py",
        "condition[0, place] = 1",
        "condition[0, run.latent_start] = 1",
        DIFFUSION,
    ),
    Mutant(
        "head and tail of i2v swapped",
        "megasora/diffusion/conditions.py",
        '"i2v_head": (head,), "i2v_loop": (head, tail), "i2v_tail": (tail,)',
        '"i2v_head": (tail,), "i2v_loop": (head, tail), "i2v_tail": (head,)',
        DIFFUSION,
    ),
    Mutant("head and tail of v2v swapped", "megasora/diffusion/conditions.py", 'if "head" in kind:', 'if "tail" in kind:', DIFFUSION),
    Mutant("easy v2v is the plain one", "megasora/diffusion/conditions.py", "V2V_EASY_FRAMES = 65", "V2V_EASY_FRAMES = 33", DIFFUSION),
    Mutant(
        "condition weights ignored",
        "megasora/diffusion/conditions.py",
        "threshold -= weight",
        "threshold -= sum(kinds.values()) / len(kinds)",
        DIFFUSION,
    ),
    Mutant(
        "v2v drawn for a clip as long as its condition",
        "megasora/diffusion/conditions.py",
        '"v2v": V2V_FRAMES + 1}',
        '"v2v": V2V_FRAMES}',
        DIFFUSION,
    ),
    Mutant(
        "patch channels last",
        "megasora/diffusion/patchify.py",
        "-> (t h w) (c ph pw)",
        "-> (t h w) (ph pw c)",
        DIFFUSION,
    ),
    Mutant(
        "key without the step",
        "megasora/diffusion/philox.py",
        "for value in (seed, int(stream), epoch, sample, step):",
        "for value in (seed, int(stream), epoch, sample):",
        DIFFUSION,
    ),
    Mutant("Philox with one Weyl constant", "megasora/diffusion/philox.py", "(k1 + _WEYL[1])", "(k1 + _WEYL[0])", DIFFUSION),
    Mutant("pairs of normals mirror each other", "megasora/diffusion/philox.py", "mul_(0.5 * math.pi)", "mul_(1.0 * math.pi)", DIFFUSION),
    Mutant("motion score cut off", "megasora/diffusion/captions.py", "int(motion_score + 0.5)", "int(motion_score)", PLAN),
)

_TRAINING = (
    Mutant(
        "warm-up one step late",
        "megasora/training/optimizer.py",
        "(step + 1) / config.warmup_steps",
        "step / config.warmup_steps",
        RATES,
    ),
    Mutant(
        "warm-up ignored",
        "megasora/training/optimizer.py",
        "return rate * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else rate",
        "return rate",
        RATES,
    ),
    Mutant("milestone one step late", "megasora/training/optimizer.py", "if step >= milestone:", "if step > milestone:", RATES),
    Mutant(
        "rate of the next step",
        "megasora/training/run.py",
        "learning_rate(trainee.step, config",
        "learning_rate(trainee.step + 1, config",
        STEPS,
    ),
    Mutant(
        "rate reported one step off",
        "megasora/training/run.py",
        "learning_rate(trainee.step - 1,",
        "learning_rate(trainee.step,",
        STEPS,
    ),
    Mutant("gradient clip ignored", "megasora/training/optimizer.py", "clip_grad=optimizer.clip_grad", "clip_grad=0.0", STEPS),
    Mutant("weight decay ignored", "megasora/training/optimizer.py", 'optimizer.weight_decay * group["wd_mult"]', "0.0", STEPS),
    Mutant(
        "weight decay on biases and scales too",
        "megasora/training/optimizer.py",
        'optimizer.weight_decay * group["wd_mult"]',
        "optimizer.weight_decay",
        STEPS,
    ),
    Mutant(
        "second moment decays like the first",
        "megasora/training/optimizer.py",
        "adam_beta2=optimizer.beta2",
        "adam_beta2=optimizer.beta1",
        STEPS,
    ),
    Mutant("Adam's epsilon ignored", "megasora/training/optimizer.py", "adam_eps=optimizer.eps", "adam_eps=1e-3", STEPS),
    Mutant("EMA decay on the wrong side", "megasora/training/optimizer.py", "1 - self.decay)", "self.decay)", STEPS),
    Mutant(
        "EMA before the optimizer's step",
        "megasora/training/run.py",
        "        _, norm, _ = trainee.optimizer.step()\n        grad_norm = float(norm)\n        if trainee.ema is not None:\n"
        "            trainee.ema.update()\n",
        "        if trainee.ema is not None:\n            trainee.ema.update()\n        _, norm, _ = trainee.optimizer.step()\n"
        "        grad_norm = float(norm)\n",
        STEPS,
    ),
    Mutant(
        "EMA starts again at a resume",
        "megasora/training/run.py",
        '    trainee.step = facts["step"]\n',
        '    trainee.step = facts["step"]\n    if trainee.ema is not None:\n        trainee.ema.reset()\n',
        STEPS,
    ),
    Mutant(
        "Adam's step counter starts again at a resume",
        "megasora/training/run.py",
        '    ensure_adam_state(trainee.optimizer, step=facts["step"])\n    trainee.step',
        "    ensure_adam_state(trainee.optimizer, step=0)\n    trainee.step",
        STEPS,
    ),
    Mutant(
        "sampler starts again at a resume",
        "megasora/training/run.py",
        'trainee.sampler = SamplerState(**state["sampler"])',
        "trainee.sampler = SamplerState()",
        STEPS,
    ),
    Mutant(
        "samples seen forgotten at a resume",
        "megasora/training/run.py",
        'trainee.samples_seen = state["samples_seen"]',
        "trainee.samples_seen = 0",
        STEPS,
    ),
    Mutant(
        "master weights not refreshed after a resume",
        "megasora/training/run.py",
        "    if trainee.megatron_config.params_dtype == torch.float32:\n        refresh_masters(trainee.optimizer)\n",
        "",
        STEPS,
        equivalent="an fp32 run's masters are views of its parameters (OwnedShard.master), so loading the parameters has set them",
    ),
    Mutant(
        "a run goes on with another seed",
        "megasora/training/run.py",
        "        if state[name] != value:",
        '        if name == "model" and state[name] != value:',
        STEPS,
    ),
    Mutant(
        "a loss that is no number is trained on",
        "megasora/training/run.py",
        "if counted and not math.isfinite(loss):",
        "if False:",
        STEPS,
    ),
    Mutant(
        "loss over packs, not samples",
        "megasora/training/run.py",
        "(total / count if count else math.nan)",
        "(total / len(batch.batches) if count else math.nan)",
        DRAWS,
    ),
    Mutant(
        "rate of work of the whole job, not of a GPU",
        "megasora/training/run.py",
        "flops / seconds / context.world_size",
        "flops / seconds",
        DRAWS,
    ),
    Mutant("a step twice in a resumed log", "megasora/training/metrics.py", '["step"] <= last_step', '["step"] <= last_step + 1', LOG),
    Mutant("NaN in the log", "megasora/training/metrics.py", "not math.isfinite(value) else value", "False else value", LOG),
    Mutant("CLIP's dropout draws T5's numbers", "megasora/training/feed.py", "Stream.DROPOUT_CLIP)) <", "Stream.DROPOUT_T5)) <", DRAWS),
    Mutant(
        "T5 dropped at CLIP's rate",
        "megasora/training/feed.py",
        "Stream.DROPOUT_T5)) < data.dropout_t5",
        "Stream.DROPOUT_T5)) < data.dropout_clip",
        DRAWS,
    ),
    Mutant("text dropped with CLIP's draw", "megasora/training/feed.py", "null_text if drop_t5", "null_text if drop_clip", DRAWS),
    Mutant("draws the same every epoch", "megasora/training/feed.py", "epoch=planned.plan.epoch", "epoch=0", DRAWS),
    Mutant("draws the same every step", "megasora/training/feed.py", "step=planned.step)", "step=0)", DRAWS),
    Mutant("draws the same for all samples", "megasora/training/feed.py", "sample=sample, step", "sample=0, step", DRAWS),
    Mutant("noise draws the times' numbers", "megasora/training/feed.py", "Stream.NOISE)", "Stream.TIMESTEP)", DRAWS),
    Mutant("condition draws the dropout's numbers", "megasora/training/feed.py", "Stream.CONDITION)))", "Stream.DROPOUT_T5)))", DRAWS),
    Mutant(
        "shift from tokens, not latent pixels",
        "megasora/training/feed.py",
        "(frames, height * patch, width * patch)",
        "(frames, height, width)",
        DRAWS,
    ),
    Mutant("a failed clip counts", "megasora/training/feed.py", 'weight=float(parts["ok"])', "weight=1.0", DRAWS),
    Mutant(
        "a filler pack counts",
        "megasora/training/feed.py",
        "noise_key=0,\n            weight=0.0",
        "noise_key=0,\n            weight=1.0",
        STEPS,
    ),
    Mutant(
        "latents divided by the scaling factor",
        "megasora/training/material.py",
        "latent * scaling_factor",
        "latent / scaling_factor",
        DRAWS,
    ),
    Mutant("given frames take the clip's noise", "megasora/training/material.py", "elements += latent.numel()", "elements += 0", DRAWS),
    Mutant("a pack's limit ignored", "megasora/training/feed.py", "max_tokens=data.max_pack_tokens", "max_tokens=None", DRAWS),
    Mutant("padding share turned round", "megasora/training/feed.py", "pad_share=1 - real / computed", "pad_share=real / computed", DRAWS),
    Mutant(
        "given frames from the head of the clip",
        "megasora/training/material.py",
        "self.video[:, run.start : run.start + run.count]",
        "self.video[:, : run.count]",
        DRAWS,
    ),
    Mutant(
        "samples counted on every context rank",
        "megasora/training/microbatch.py",
        "counted = batch.num_counted if context_rank == 0 else 0",
        "counted = batch.num_counted",
        MICROBATCH,
    ),
    Mutant(
        "long samples weigh more",
        "megasora/training/microbatch.py",
        "sample.weight / (len(sample.tokens) * channels)",
        "sample.weight / (pack.num_video * channels)",
        MICROBATCH,
    ),
    Mutant(
        "sample weight ignored",
        "megasora/training/microbatch.py",
        "sample.weight / (len(sample.tokens) * channels)",
        "1.0 / (len(sample.tokens) * channels)",
        MICROBATCH,
    ),
    Mutant(
        "samples of weight zero are counted",
        "megasora/training/microbatch.py",
        "sum(sample.weight > 0 for sample in samples)",
        "len(samples)",
        MICROBATCH,
    ),
    Mutant(
        "noise and latent swapped",
        "megasora/training/microbatch.py",
        "interpolate(x_0, x_1, sample.t",
        "interpolate(x_1, x_0, sample.t",
        MICROBATCH,
    ),
)

_MODEL = (
    Mutant(
        "latents multiplied at decode",
        "megasora/models/encoders/vae.py",
        "latent[None] / self.scaling_factor",
        "latent[None] * self.scaling_factor",
        ENCODERS,
    ),
    Mutant(
        "latents divided at encode",
        "megasora/models/encoders/vae.py",
        "with_noise(noise)) * self.scaling_factor",
        "with_noise(noise)) / self.scaling_factor",
        ENCODERS,
    ),
    Mutant(
        "posterior sample without its width",
        "megasora/models/encoders/posterior.py",
        "self.mean + self.std * noise",
        "self.mean + noise",
        ENCODERS,
    ),
    Mutant(
        "a posterior always draws the first elements",
        "megasora/models/encoders/posterior.py",
        "torch.arange(first_element, first_element + math.prod(shape)",
        "torch.arange(math.prod(shape)",
        ENCODERS,
    ),
    Mutant(
        "every clip from the same noise",
        "megasora/models/sampler.py",
        "stream=Stream.SAMPLE, sample=number",
        "stream=Stream.SAMPLE, sample=0",
        BRANCHES,
    ),
    Mutant(
        "prompt and empty text swapped",
        "megasora/models/sampler.py",
        "{True: text_share(prompt.text), False: text_share(prompt.null_text)}",
        "{False: text_share(prompt.text), True: text_share(prompt.null_text)}",
        BRANCHES,
    ),
    Mutant(
        "image condition given to the other branch",
        "megasora/models/sampler.py",
        "(with_image if image_on else without)",
        "(without if image_on else with_image)",
        BRANCHES,
    ),
    Mutant(
        "sampling times not shifted",
        "megasora/models/sampler.py",
        "sampling_times(settings.steps, shift=shift)",
        "sampling_times(settings.steps, shift=1.0)",
        BRANCHES,
    ),
    Mutant(
        "rotary axes in another order",
        "megasora/models/mmdit/rotary.py",
        "positions[:, axis, None]",
        "positions[:, 2 - axis, None]",
        MATHS,
    ),
    Mutant(
        "rotation the other way", "megasora/models/mmdit/rotary.py", "addcmul_(b, sin * w_b, value=-1)", "addcmul_(b, sin * w_b)", MATHS
    ),
    Mutant(
        "backward of the rotation the same way",
        "megasora/models/mmdit/rotary.py",
        "addcmul_(g_a, sin, value=-1)",
        "addcmul_(g_a, sin)",
        MATHS,
    ),
    Mutant(
        "shift and scale swapped before the MLP",
        "megasora/models/mmdit/blocks.py",
        "shift=rows[3], scale=rows[4]",
        "shift=rows[4], scale=rows[3]",
        DIFFUSERS,
    ),
    Mutant(
        "halves of the final modulation swapped",
        "megasora/models/mmdit/blocks.py",
        "shift, scale = self.adaLN_modulation(vec)",
        "scale, shift = self.adaLN_modulation(vec)",
        DIFFUSERS,
    ),
    Mutant(
        "single block's shift and scale swapped",
        "megasora/models/mmdit/blocks.py",
        "shift, scale, gate = self.modulation(vec)",
        "scale, shift, gate = self.modulation(vec)",
        DIFFUSERS,
    ),
    Mutant("exact GELU in single blocks", "megasora/models/mmdit/blocks.py", 'F.gelu(mlp, approximate="tanh")', "F.gelu(mlp)", DIFFUSERS),
    Mutant(
        "modulation scales by s, not 1 + s",
        "megasora/models/mmdit/modulation.py",
        "normed, _per_token(1 + scale, runs))",
        "normed, _per_token(scale, runs))",
        MATHS,
    ),
    Mutant(
        "gradient of the scale from unnormed tokens",
        "megasora/models/mmdit/modulation.py",
        "_segment_sum(grad * normed, runs)",
        "_segment_sum(grad * x, runs)",
        MATHS,
    ),
    Mutant(
        "vec's gradient not summed over TP",
        "megasora/models/mmdit/layers.py",
        "copy_to_tensor_region(vec, group=self.tp_group)",
        "vec",
        _parity("tp2"),
    ),
    Mutant(
        "norm scales not marked sequence parallel",
        "megasora/models/mmdit/layers.py",
        "        mark_sequence_parallel(self, layers.config)\n",
        "",
        _parity("tp2"),
        equivalent="Megatron sums q_layernorm and k_layernorm by name, marked or not (qk_layernorm)",
    ),
    Mutant(
        "token embedders not marked sequence parallel",
        "megasora/models/mmdit/spec.py",
        "return mark_sequence_parallel(self.replicated(input_size, output_size), self.config)",
        "return self.replicated(input_size, output_size)",
        _parity("tp2"),
    ),
    Mutant(
        "time embedding sine first",
        "megasora/models/mmdit/layers.py",
        "[angles.cos(), angles.sin()]",
        "[angles.sin(), angles.cos()]",
        MATHS,
    ),
    Mutant("time embedding without its factor", "megasora/models/mmdit/layers.py", "TIME_FACTOR = 1000.0", "TIME_FACTOR = 1.0", MATHS),
    Mutant(
        "condition tokens ignored",
        "megasora/models/mmdit/model.py",
        "img + self.cond_in(inputs.cond)",
        "img",
        ("tests/parallel/test_parity.py::test_every_parameter_has_a_part_in_the_loss",),
    ),
    Mutant(
        "queries and keys swapped in storage",
        "megasora/models/mmdit/canonical.py",
        'for part in ("q", "k", "v")]',
        'for part in ("k", "q", "v")]',
        LAYOUT,
    ),
    Mutant("cond_in starts at random", "megasora/models/mmdit/initialization.py", '"final_layer.", "cond_in.")', '"final_layer.")', LAYOUT),
    Mutant(
        "initial weights too small",
        "megasora/models/mmdit/initialization.py",
        "(2.0 / (fan_in + fan_out)) ** 0.5",
        "(2.0 / (fan_in + fan_out))",
        LAYOUT,
    ),
    Mutant(
        "recompute counts swapped",
        "megasora/models/mmdit/stages.py",
        "recompute_double=recompute[0]",
        "recompute_double=recompute[1]",
        LAYOUT,
    ),
    Mutant(
        "every chunk of the last rank is the last",
        "megasora/models/mmdit/stages.py",
        "post_process=v == vp - 1 and pp_rank == pp - 1",
        "post_process=pp_rank == pp - 1",
        LAYOUT,
    ),
    Mutant(
        "stages own their blocks in reverse",
        "megasora/config/pipeline_split.py",
        "order = vp_stage * pp_size + pp_rank",
        "order = vp_stage * pp_size + pp_size - 1 - pp_rank",
        LAYOUT,
    ),
    Mutant(
        "split by parameters is one by FLOPs",
        "megasora/config/pipeline_split.py",
        'if by == "flops":',
        'if by in ("flops", "parameters"):',
        LAYOUT,
    ),
)

_PARALLEL = (
    Mutant(
        "context ranks own runs of tokens",
        "megasora/parallel/pack.py",
        "torch.arange(cp_rank, length, self.split.cp)",
        "torch.arange(length).chunk(self.split.cp)[cp_rank]",
        PACK,
    ),
    Mutant("row multiple ignored", "megasora/parallel/pack.py", "self.tp * self.cp * self.row_multiple", "self.tp * self.cp", PACK),
    Mutant(
        "streams joined text after video",
        "megasora/parallel/pack.py",
        "for stream in (text, video)]",
        "for stream in (video, text)]",
        PACK,
    ),
    Mutant(
        "ring merge without weights",
        "megasora/parallel/context.py",
        "a.out * weight_a + b.out * weight_b",
        "(a.out + b.out) / 2",
        _parity("cp2 ring"),
    ),
    Mutant(
        "ring's value gradients are the keys'",
        "megasora/parallel/context.py",
        "grad_chunk[1] += parts[2]",
        "grad_chunk[1] += parts[1]",
        _parity("cp2 ring"),
    ),
    Mutant(
        "heads come back in another order",
        "megasora/parallel/context.py",
        "received.permute(1, 0, 2, 3).reshape(tokens",
        "received.reshape(tokens",
        _parity("cp2 ulysses"),
    ),
    Mutant(
        "gathered gradients not summed",
        "megasora/parallel/tensor.py",
        "columns //= group.size()",
        "columns //= group.size()\n        grad = grad / group.size()",
        _parity("tp2"),
    ),
    Mutant(
        "a flat run's rectangle one column off",
        "megasora/parallel/shards.py",
        "start = offset + (top - row) * num_columns + (left - column)",
        "start = offset + (top - row) * num_columns",
        ("tests/unit/parallel/test_shards.py",),
    ),
    Mutant(
        "interleaved groups must divide",
        "megasora/parallel/pipeline.py",
        "if rest == 0 or rest >= pp_size:",
        "if rest == 0:",
        ("tests/unit/parallel/test_pipeline.py",),
    ),
)

_CHECKPOINT = (
    Mutant(
        "tracker moved before the folder",
        "megasora/checkpoint/store.py",
        "        shutil.rmtree(final, ignore_errors=True)\n        temporary.rename(final)\n"
        '        _write_synced(root / f".{TRACKER}.tmp", final.name + "\\n")\n        (root / f".{TRACKER}.tmp").replace(root / TRACKER)\n',
        '        _write_synced(root / f".{TRACKER}.tmp", final.name + "\\n")\n        (root / f".{TRACKER}.tmp").replace(root / TRACKER)\n'
        "        shutil.rmtree(final, ignore_errors=True)\n        temporary.rename(final)\n",
        STORE,
    ),
    Mutant(
        "the old checkpoint goes before the new one is whole",
        "megasora/checkpoint/store.py",
        "        shutil.rmtree(temporary, ignore_errors=True)\n        temporary.mkdir()\n",
        "        shutil.rmtree(temporary, ignore_errors=True)\n        shutil.rmtree(final, ignore_errors=True)\n"
        "        temporary.mkdir()\n",
        STORE,
    ),
    Mutant(
        "files not synced before the manifest",
        "megasora/checkpoint/store.py",
        "        os.fsync(file.fileno())\n        digest",
        "        digest",
        STORE,
    ),
    Mutant(
        "pruning removes the newest",
        "megasora/checkpoint/store.py",
        "entries[:-keep] if keep else []",
        "entries[keep:] if keep else []",
        PRUNE,
    ),
    Mutant(
        "pruning keeps one too few",
        "megasora/checkpoint/store.py",
        "entries[:-keep] if keep else []",
        "entries[: 1 - keep or None] if keep else []",
        PRUNE,
    ),
    Mutant(
        "milestone checkpoints are removed",
        "megasora/checkpoint/store.py",
        "entry.step % keep_every_steps == 0)",
        "entry.step % keep_every_steps != 0)",
        PRUNE,
    ),
    Mutant(
        "the oldest checkpoint is resumed",
        "megasora/checkpoint/store.py",
        'sorted(root.glob("step_*"))',
        'sorted(root.glob("step_*"), reverse=True)',
        PRUNE,
    ),
    Mutant("a torn file is accepted", "megasora/checkpoint/manifests.py", 'if size != facts["bytes"]:', 'if size > facts["bytes"]:', PRUNE),
    Mutant(
        "a manifest may name any path",
        "megasora/checkpoint/manifests.py",
        "if Path(name).name != name:",
        "if False:",
        PRUNE,
    ),
    Mutant(
        "weights pass for a training checkpoint",
        "megasora/checkpoint/store.py",
        'if manifest["format"] != manifests.TRAINING:',
        "if False:",
        PRUNE,
    ),
    Mutant(
        "hashes not compared by the proof",
        "megasora/checkpoint/verify.py",
        "if wrong:",
        "if False:",
        _convert("the_proof_notices_one_wrong_bit"),
    ),
    Mutant(
        "inverse not compared with the source's hash",
        "megasora/checkpoint/verify.py",
        'return sha256_of(rows) == facts["source_tensors"][key]["sha256"]',
        "return True",
        _convert("the_proof_notices_one_wrong_bit"),
    ),
    Mutant(
        "inverse not compared with the source",
        "megasora/checkpoint/verify.py",
        "if plan is not None and not np.array_equal(",
        "if plan is not None and False and not np.array_equal(",
        _convert("the_proof_needs_the_same_source_and_flags"),
    ),
    Mutant(
        "proof of a target made with other flags",
        "megasora/checkpoint/verify.py",
        'if options is not None and dict(options) != facts["options"]:',
        "if False:",
        _convert("the_proof_needs_the_same_source_and_flags"),
    ),
    Mutant(
        "any difference counts as equal",
        "megasora/checkpoint/compare.py",
        "self.max_rel <= rtol)",
        "self.max_rel >= rtol)",
        _inspect("exit_codes") + _inspect("differences_are_found_in_any_pair_of_formats"),
    ),
    Mutant(
        "missing tensors count as equal",
        "megasora/checkpoint/compare.py",
        "not self.only_a and not self.only_b and all(",
        "not self.only_a and all(",
        _inspect("a_missing_tensor_and_a_nan_are_differences"),
    ),
    Mutant(
        "NaN against a number counts as equal",
        "megasora/checkpoint/compare.py",
        "lost = np.isnan(x) != np.isnan(y)",
        "lost = np.isnan(x) & np.isnan(y)",
        _inspect("a_missing_tensor_and_a_nan_are_differences"),
    ),
    Mutant(
        "flux keeps our row order",
        "megasora/checkpoint/formats/rules.py",
        '"heads" if fmt == "flux" else "same"',
        '"same"',
        LORA,
    ),
    Mutant(
        "diffusers' final modulation not swapped",
        "megasora/checkpoint/formats/rules.py",
        '"swap" if stem == "final_layer.adaLN_modulation.1" else "same"',
        '"same"',
        DIFFUSERS,
    ),
    Mutant(
        "v and MLP rows of diffusers overlap",
        "megasora/checkpoint/formats/rules.py",
        "Part(key=key, start=h, rows=ffn)",
        "Part(key=key, start=0, rows=ffn)",
        ("tests/unit/checkpoint/test_formats.py",),
    ),
    Mutant("LoRA's alpha ignored", "megasora/checkpoint/formats/lora.py", "return self.alpha / self.a.shape[0]", "return 1.0", LORA),
    Mutant("LoRA's default alpha ignored", "megasora/checkpoint/formats/lora.py", ".get(name, default_alpha)", ".get(name)", LORA),
    Mutant("stacked LoRA pairs share columns", "megasora/checkpoint/formats/lora.py", "column += block.shape[1]", "column += 0", LORA),
    Mutant(
        "LoRA's scale ignored", "megasora/checkpoint/conversion_plan.py", "(scale * pair.scale) * (pair.b", "pair.scale * (pair.b", LORA
    ),
    Mutant(
        "condition's bias lost when folded",
        "megasora/checkpoint/conversion_plan.py",
        '_sum(source.read("img_in.bias"), bias)',
        'source.read("img_in.bias")',
        ("tests/unit/checkpoint/test_formats.py",),
    ),
    Mutant(
        "lost source tensors are no error",
        "megasora/checkpoint/conversion_plan.py",
        "    if lost:\n",
        "    if False:\n",
        _convert("there_and_back_returns_every_bit"),
        equivalent="guards our own tables: unknown tensors are refused before, every format uses each row once (tested)",
    ),
    Mutant(
        "a tensor of another shape passes",
        "megasora/checkpoint/formats/mapping.py",
        "if infos[key].shape != shape:",
        "if False:",
        _security("a_tensor_of_another_shape_is_refused"),
    ),
    Mutant(
        "holes between tensors pass",
        "megasora/checkpoint/safetensors_io.py",
        "if start != position:",
        "if start < position:",
        _security("a_header_that_lies_is_refused"),
    ),
    Mutant(
        "overlapping tensors pass",
        "megasora/checkpoint/safetensors_io.py",
        "if start != position:",
        "if start > position:",
        _security("a_header_that_lies_is_refused"),
    ),
    Mutant(
        "a key may stand twice",
        "megasora/checkpoint/safetensors_io.py",
        "if len(result) != len(pairs):",
        "if False:",
        _security("a_file_that_is_none_is_refused"),
    ),
    Mutant(
        "an index may name any path",
        "megasora/checkpoint/safetensors_io.py",
        "if Path(name).name != name or name in",
        "if name in",
        _security("an_index_that_points_elsewhere_is_refused"),
    ),
    Mutant(
        "the unpickler takes any torch global",
        "megasora/checkpoint/megatron_io.py",
        "if (module, name) not in self._allowed:",
        'if not module.startswith("torch") and (module, name) not in self._allowed:',
        _security("a_global_outside_the_table_is_refused_whoever_owns_it"),
    ),
    Mutant(
        "the unpickler imports what is not listed",
        "megasora/checkpoint/megatron_io.py",
        "return self._allowed[module, name]",
        "return self._allowed.get((module, name)) or super().find_class(module, name)",
        _security("a_global_outside_the_table_is_refused_whoever_owns_it"),
        equivalent="find_class has refused every name outside the table two lines before, and no entry of the table is falsy",
    ),
    Mutant(
        "a checkpoint's piece may lie anywhere",
        "megasora/checkpoint/megatron_io.py",
        "Path(name).name != name or name in",
        "name in",
        _security("a_piece_outside_the_folder_is_refused"),
    ),
    Mutant(
        "a journal of another plan goes on",
        "megasora/checkpoint/convert.py",
        'same = json.loads(lines[0])["identity"] == identity',
        'same = "identity" in json.loads(lines[0])',
        _convert("another_plan_starts_over"),
    ),
    Mutant(
        "journaled before it is on disk",
        "megasora/checkpoint/convert.py",
        "        self.output.sync(worker)\n",
        "",
        _convert("nothing_is_journaled_that_may_not_be_on_disk"),
    ),
    Mutant(
        "a full disk is not noticed",
        "megasora/checkpoint/convert.py",
        "if needed + (64 << 20) > free:",
        "if False:",
        _convert("a_full_disk_is_noticed_first"),
    ),
    Mutant(
        "a shard may exceed its size",
        "megasora/checkpoint/outputs.py",
        "if not shards or info.num_bytes > room:",
        "if not shards or room <= 0:",
        _convert("shards_are_filled_in_order_and_never_too_full"),
    ),
)

_DATA = (
    Mutant(
        "a sample is taken twice",
        "megasora/data/plan.py",
        "SamplerState(epoch=state.epoch, consumed=position)",
        "SamplerState(epoch=state.epoch, consumed=max(state.consumed + 1, position - 1))",
        PLAN,
    ),
    Mutant(
        "samples drawn with replacement",
        "megasora/data/plan.py",
        "return generator.permutation(num_samples)",
        "return generator.integers(0, num_samples, num_samples)",
        PLAN,
    ),
    Mutant("the same order every epoch", "megasora/data/plan.py", "0xFFFFFFFFFFFFFFFF, epoch]", "0xFFFFFFFFFFFFFFFF, 0]", PLAN),
    Mutant(
        "the sample that does not fit is skipped",
        "megasora/data/plan.py",
        "SamplerState(epoch=state.epoch, consumed=position)",
        "SamplerState(epoch=state.epoch, consumed=position + 1)",
        PLAN,
    ),
    Mutant(
        "a step exceeds its budget",
        "megasora/data/plan.py",
        "total + tokens[order[position]] <= global_tokens",
        "total < global_tokens",
        PLAN,
    ),
    Mutant("resolution weights ignored", "megasora/data/plan.py", "weights.get(clip.resolution, 1.0)", "1.0", PLAN),
    Mutant(
        "image and video weights swapped",
        "megasora/data/plan.py",
        "data.image_weight if clips[start].num_frames == 1 else data.video_weight",
        "data.video_weight if clips[start].num_frames == 1 else data.image_weight",
        PLAN,
    ),
    Mutant(
        "shape chosen from the uncropped picture",
        "megasora/data/plan.py",
        "_, _, crop_width, crop_height = clip.crop or (0, 0, clip.width, clip.height)",
        "crop_width, crop_height = clip.width, clip.height",
        REQUESTS,
    ),
    Mutant(
        "class chosen from the uncropped picture",
        "megasora/data/plan.py",
        "_, _, width, height = clip.crop or (0, 0, clip.width, clip.height)",
        "width, height = clip.width, clip.height",
        REQUESTS,
    ),
    Mutant("crop not asked for", "megasora/data/plan.py", "crop=clip.clip.crop,", "crop=None,", REQUESTS),
    Mutant("start frame not asked for", "megasora/data/plan.py", "start=clip.clip.start_frame,", "start=0,", REQUESTS),
    Mutant(
        "stride not asked for",
        "megasora/data/plan.py",
        "stride=clip.stride,\n        num_frames",
        "stride=1,\n        num_frames",
        REQUESTS,
    ),
    Mutant(
        "frames at a stride rounded down",
        "megasora/data/plan.py",
        "(clip.num_frames - 1) // stride + 1",
        "clip.num_frames // stride",
        REQUESTS,
    ),
    Mutant("caption says the file's frame rate", "megasora/data/plan.py", "self.clip.fps / self.stride", "self.clip.fps", REQUESTS),
    Mutant(
        "a pack's limit does not bind",
        "megasora/data/plan.py",
        "self.most = sum(tokens) if max_tokens is None else max_tokens",
        "self.most = sum(tokens)",
        PLAN,
    ),
    Mutant(
        "a sample larger than a pack is planned",
        "megasora/data/plan.py",
        "if data.max_pack_tokens is not None and planned.tokens > data.max_pack_tokens:",
        "if False:",
        PLAN,
    ),
    Mutant(
        "interleaving's multiple ignored", "megasora/data/plan.py", "num_microbatches += microbatch_multiple", "num_microbatches += 1", PLAN
    ),
    Mutant(
        "packs balanced by tokens, not cost",
        "megasora/data/plan.py",
        "return 24.0 * hidden_size**2 * tokens + 4.0 * tokens**2 * hidden_size",
        "return 24.0 * hidden_size**2 * tokens",
        PLAN,
    ),
    Mutant("small clips are enlarged", "megasora/data/plan.py", "pixels_of(name) <= height * width", "True", PLAN),
    Mutant(
        "aspect by difference, not ratio",
        "megasora/data/buckets.py",
        "abs(math.log((size[0] / size[1]) / (height / width)))",
        "abs(size[0] / size[1] - height / width)",
        REQUESTS,
    ),
    Mutant(
        "portrait clips in landscape sizes",
        "megasora/data/buckets.py",
        "landscape + [(w, h) for h, w in landscape if w != h]",
        "landscape",
        PLAN,
    ),
    Mutant("an exact frame count does not fit", "megasora/data/buckets.py", "if count <= available)", "if count < available)", REQUESTS),
    Mutant(
        "stride to the faster rate",
        "megasora/data/buckets.py",
        "math.ceil(fps / target_fps - 1e-6)",
        "math.floor(fps / target_fps + 1e-6)",
        PLAN,
    ),
    Mutant(
        "stride doubles by a rounding error",
        "megasora/data/buckets.py",
        "math.ceil(fps / target_fps - 1e-6)",
        "math.ceil(fps / target_fps)",
        REQUESTS,
    ),
    Mutant(
        "a manifest's size rounded up",
        "megasora/data/buckets.py",
        "(height // multiple * multiple, width",
        "(-(-height // multiple) * multiple, width",
        PLAN,
    ),
    Mutant("last frame of a range ignored", "megasora/data/manifest.py", "min(frames, int(end) - start)", "frames", REQUESTS),
    Mutant("a short read is accepted", "megasora/data/decoding/contract.py", "if num_frames != request.num_frames:", "if False:", DECODE),
    Mutant(
        "a crop outside the picture is accepted",
        "megasora/data/decoding/contract.py",
        "x + crop_width > width or",
        "",
        LOADING,
    ),
    Mutant(
        "pixels not centred",
        "megasora/data/decoding/contract.py",
        "div_(127.5).sub_(1.0)",
        "div_(255.0)",
        ("tests/unit/data/decoding/test_decode_pixels.py",),
    ),
    Mutant("frames before the start are given", "megasora/data/decoding/pyav.py", "if number < request.start:", "if False:", DECODE),
    Mutant("stride ignored when decoding", "megasora/data/decoding/pyav.py", "% request.stride == 0", ">= 0", DECODE),
    Mutant(
        "a corrupt frame is accepted",
        "megasora/data/decoding/pyav.py",
        "if spoiled is not None:",
        "if False:",
        ("tests/unit/data/decoding/test_decode_numbers.py",),
    ),
    Mutant(
        "crop ignored when decoding",
        "megasora/data/decoding/pyav.py",
        "crop = self._request.crop\n",
        "crop = None\n",
        LOADING,
    ),
    Mutant(
        "frames counted by channels",
        "megasora/data/loader.py",
        "frames=sum(video.shape[1]",
        "frames=sum(video.shape[0]",
        ("tests/unit/data/test_decode_loader.py",),
    ),
    Mutant(
        "a clip's time limit ignored",
        "megasora/data/loader.py",
        "return self._timeout_s * len(work.tasks)",
        "return 60.0 + self._timeout_s * len(work.tasks)",
        LOADING,
    ),
    Mutant(
        "a stale cache is accepted",
        "megasora/data/cache/identity.py",
        "if field.name not in leave_out and getattr(ours",
        'if field.name == "store" and getattr(ours',
        CACHE,
    ),
    Mutant(
        "another encoder's cache is accepted",
        "megasora/data/cache/identity.py",
        "if now.sha256 != known.sha256:",
        "if False:",
        ("tests/parallel/test_cached_feed.py::test_a_cache_of_something_else_is_refused_with_what_differs",),
    ),
    Mutant("a sample's checksum skipped", "megasora/data/cache/reading.py", "!= expected:", "!= expected and False:", SHARDS),
    Mutant(
        "an index's hash skipped",
        "megasora/data/cache/shards.py",
        "if hashlib.sha256(index_content).hexdigest() != facts.index_sha256:",
        "if False:",
        SHARDS,
    ),
    Mutant("a shard's size not checked", "megasora/data/cache/shards.py", "if size != facts.tar_bytes:", "if False:", SHARDS),
    Mutant(
        "a shard's SHA-256 not checked", "megasora/data/cache/shards.py", "hexdigest() != facts.tar_sha256:", "hexdigest() == '':", SHARDS
    ),
    Mutant(
        "a shard made again counts as finished at once",
        "megasora/data/cache/shards.py",
        '        (self.folder / f"{name}.json").unlink(missing_ok=True)  # a shard that is made again is unfinished until the end\n',
        "",
        SHARDS,
    ),
    Mutant(
        "narrow tensors stored first",
        "megasora/data/cache/shards.py",
        "(-layout[name][0].itemsize, name)",
        "(layout[name][0].itemsize, name)",
        SHARDS,
    ),
    Mutant(
        "array tasks dealt out one off", "megasora/training/encode/run.py", "own = range(task, plan", "own = range(task + 1, plan", CACHE
    ),
    Mutant("array's step ignored", "megasora/training/encode/plan.py", "- first) // step", "- first)", CACHE),
    Mutant(
        "latent frames one too few",
        "megasora/data/cache/layout.py",
        "frames = (num_frames - 1) // self.temporal_compression + 1",
        "frames = num_frames // self.temporal_compression",
        CACHE,
    ),
    Mutant(
        "simulated efficiency upside down",
        "megasora/data/pack_stats.py",
        "return self.work / self.time",
        "return self.time / self.work",
        ("tests/unit/data/test_pack_stats.py",),
    ),
)

_CURATION = (
    Mutant(
        "longest duration flipped",
        "megasora/curation/rules.py",
        '"duration_s", ">", rules.max_duration_s',
        '"duration_s", "<", rules.max_duration_s',
        RULES,
    ),
    Mutant(
        "shortest duration flipped",
        "megasora/curation/rules.py",
        '"duration_s", "<", rules.min_duration_s',
        '"duration_s", ">", rules.min_duration_s',
        RULES,
    ),
    Mutant("aesthetic threshold flipped", "megasora/curation/rules.py", '"aesthetic", "<"', '"aesthetic", ">"', RULES),
    Mutant("frame rate threshold flipped", "megasora/curation/rules.py", '"fps", "<"', '"fps", ">"', RULES),
    Mutant("text threshold flipped", "megasora/curation/rules.py", '"text_area", ">"', '"text_area", "<"', RULES),
    Mutant("upper motion threshold flipped", "megasora/curation/rules.py", '"vmaf_motion", ">"', '"vmaf_motion", "<"', RULES),
    Mutant(
        "a clip at the blur threshold is removed",
        "megasora/curation/rules.py",
        "OR {column} {relation} {float(limit)!r}",
        "OR {column} {relation}= {float(limit)!r}",
        RULES,
    ),
    Mutant(
        "wide clips pass",
        "megasora/curation/rules.py",
        "greatest(aspect_ratio, 1 / aspect_ratio) >",
        "least(aspect_ratio, 1 / aspect_ratio) >",
        RULES,
    ),
    Mutant(
        "side from the longer one",
        "megasora/curation/rules.py",
        "sqrt(resolution * least(aspect_ratio, 1 / aspect_ratio))",
        "sqrt(resolution * greatest(aspect_ratio, 1 / aspect_ratio))",
        RULES,
    ),
    Mutant(
        "even clips are removed for uneven ones",
        "megasora/curation/rules.py",
        '"coalesce(variable_fps, false)"',
        '"NOT coalesce(variable_fps, false)"',
        RULES,
    ),
    Mutant("a missing score passes", "megasora/curation/rules.py", "{float(limit)!r}, true)", "{float(limit)!r}, false)", RULES),
    Mutant("a score that is no number passes", "megasora/curation/rules.py", "isnan({column}) OR {column}", "{column}", RULES),
    Mutant(
        "images judged by motion", "megasora/curation/rules.py", '_VIDEO_ONLY = ("vmaf_motion", "jitter"', '_VIDEO_ONLY = ("jitter"', RULES
    ),
    Mutant(
        "clips with a caption are removed",
        "megasora/curation/rules.py",
        "trim(coalesce(text, '')) = ''",
        "trim(coalesce(text, '')) <> ''",
        RULES,
    ),
    Mutant("768px takes small clips", "megasora/curation/rules.py", "min_side_px=496", "min_side_px=160", RULES),
    Mutant(
        "of duplicates the worst stays",
        "megasora/curation/duplicates.py",
        "-rank, labels))",
        "rank, labels))",
        _filter("the_best_copy_stays_also_when_a_worse_one_fails_another_rule"),
    ),
    Mutant(
        "half of the frames make a duplicate",
        "megasora/curation/duplicates.py",
        "2 * matched > frames[mine]",
        "2 * matched >= frames[mine]",
        _filter("frames_match_up_to_the_distance_and_most_must"),
    ),
    Mutant(
        "frames one bit too near match",
        "megasora/curation/duplicates.py",
        "range_search(flat, bits + 1)",
        "range_search(flat, bits)",
        _filter("frames_match_up_to_the_distance_and_most_must"),
    ),
    Mutant(
        "a frame counts for each frame it matches",
        "megasora/curation/duplicates.py",
        "code = np.unique(i * count + owner[j])",
        "code = i * count + owner[j]",
        _filter("frames_match_up_to_the_distance_and_most_must"),
    ),
    Mutant(
        "captions lost",
        "megasora/curation/selection.py",
        "SET text = captions.given",
        "SET text = ''",
        _filter("captions_of_another_table_replace_the_text"),
    ),
    Mutant(
        "duplicates looked for among the removed",
        "megasora/curation/selection.py",
        "AS quality FROM judged WHERE removed_by IS NULL ORDER",
        "AS quality FROM judged ORDER",
        _filter("the_best_copy_stays_also_when_a_worse_one_fails_another_rule"),
    ),
    Mutant(
        "untrained aesthetic scores accepted",
        "megasora/curation/selection.py",
        'not (note and note["trained"])',
        "not note",
        _filter("a_score_that_was_not_taken_is_refused_with_the_cure"),
    ),
    Mutant(
        "bits per pixel before resolution",
        "megasora/curation/selection.py",
        'table["quality"].to_numpy(), table["resolution"].to_numpy()))',
        'table["resolution"].to_numpy(), table["quality"].to_numpy()))',
        _filter("of_equal_pictures_the_larger_then_the_richer_stays"),
    ),
    Mutant(
        "pieces a frame too long",
        "megasora/curation/shots.py",
        'settings.max_seconds * float(row["fps"]) + 1e-6',
        'settings.max_seconds * float(row["fps"]) + 1',
        PYRAMID,
    ),
    Mutant(
        "crop of borders transposed",
        "megasora/curation/shots.py",
        "height, width = (crop[3], crop[2])",
        "height, width = (crop[2], crop[3])",
        PYRAMID,
    ),
    Mutant(
        "rows in the order they are finished",
        "megasora/curation/tables.py",
        "ORDER BY _number, _item",
        "ORDER BY _item",
        POOL,
    ),
    Mutant(
        "parts of other settings are taken",
        "megasora/curation/tables.py",
        "if marker.exists() and marker.read_text() != identity:",
        "if False:",
        POOL,
    ),
    Mutant(
        "an id may occur twice",
        "megasora/curation/tables.py",
        "if key in self.order:",
        "if False:",
        POOL,
    ),
)

_CONFIG = (
    Mutant("FFN that TP does not divide", "megasora/config/validate.py", "if model.ffn_hidden_size % tp:", "if False:", CONFIG),
    Mutant("heads that TP does not divide", "megasora/config/validate.py", "if model.num_attention_heads % tp:", "if False:", CONFIG),
    Mutant("no micro-batch", "megasora/config/validate.py", "if data.num_microbatches < 1:", "if False:", CONFIG),
    Mutant(
        "micro-batches that interleaving cannot take",
        "megasora/config/validate.py",
        "if vp is not None and data.num_microbatches % pp:",
        "if False:",
        CONFIG,
    ),
    Mutant(
        "a Ulysses size that does not divide",
        "megasora/config/validate.py",
        "elif size < 1 or cp % size or heads % size:",
        "elif size < 1:",
        CONFIG,
    ),
    Mutant("media weights out of range", "megasora/config/validate.py", "if not 0 <= getattr(data, name) <= 1000:", "if False:", CONFIG),
    Mutant(
        "a class twice in the mix",
        "megasora/config/validate.py",
        "if len({name for name, _ in data.resolution_mix}) < len(data.resolution_mix):",
        "if False:",
        CONFIG,
    ),
    Mutant("FP8 in fp32", "megasora/config/validate.py", 'if precision.dtype != "bf16":', "if False:", CONFIG),
    Mutant("sigma_min out of range", "megasora/config/validate.py", "0 <= config.flow.sigma_min < 1", "True", CONFIG),
    Mutant("EMA decay of 1", "megasora/config/validate.py", "0 <= optimizer.ema_decay < 1", "0 <= optimizer.ema_decay <= 1", CONFIG),
    Mutant(
        "no prompts to sample",
        "megasora/config/validate.py",
        "if config.evaluation.sample_interval_steps and not config.evaluation.sample_prompts:",
        "if False:",
        CONFIG,
    ),
    Mutant(
        "conditions without a condition input",
        "megasora/config/validate.py",
        "if not config.model.cond_embed and any(",
        "if False and any(",
        CONFIG,
    ),
    Mutant("optimizer's memory not shared out", "megasora/config/validate.py", "(master + ema) / shards", "(master + ema)", CONFIG),
    Mutant(
        "attention's FLOPs halved",
        "megasora/perf/flops.py",
        "4 * tokens**2 * hidden_size",
        "2 * tokens**2 * hidden_size",
        ("tests/unit/perf",),
    ),
    Mutant("backward's FLOPs forgotten", "megasora/perf/flops.py", "return 3 * num_blocks", "return num_blocks", ("tests/unit/perf",)),
)

MUTANTS: tuple[Mutant, ...] = (*_DIFFUSION, *_TRAINING, *_MODEL, *_PARALLEL, *_CHECKPOINT, *_DATA, *_CURATION, *_CONFIG)
