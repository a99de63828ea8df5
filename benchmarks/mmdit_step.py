"""Forward and backward of a small MMDiT against diffusers' FluxTransformer2DModel, same weights, shapes and threads, in one process.

    python benchmarks/mmdit_step.py [--pairs 50] [--threads 2] [--json]

Hidden 512, 2 + 4 blocks, S = 320 and 1,024 tokens (64 of them text), fp32. The two are alternated; diffusers against itself is printed
beside, because that alone varies by some percent on a shared machine. Ends with one JSON line: ratio_median is ours / theirs, so below 1
is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch

warnings.filterwarnings("ignore")

from diffusers import FluxTransformer2DModel  # noqa: E402

from megasora.checkpoint.formats.mapping import CanonicalReader  # noqa: E402
from megasora.checkpoint.tensors import StateDictReader  # noqa: E402
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig  # noqa: E402
from megasora.models.mmdit.build import build_chunks  # noqa: E402
from megasora.models.mmdit.model import ModelInputs  # noqa: E402
from megasora.models.mmdit.weights import fill_parameters  # noqa: E402
from megasora.parallel import groups  # noqa: E402
from megasora.parallel.groups import ParallelContext  # noqa: E402
from megasora.parallel.pack import Pack, PackSplit, SampleShape  # noqa: E402

TEXT_TOKENS = 64
MODEL = ModelConfig(
    hidden_size=512,
    num_attention_heads=4,
    num_double_blocks=2,
    num_single_blocks=4,
    ffn_hidden_size=2048,
    text_dim=256,
    vec_dim=128,
    cond_embed=False,
)


def their_model() -> torch.nn.Module:
    """diffusers' model with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=MODEL.in_channels,
        num_layers=MODEL.num_double_blocks,
        num_single_layers=MODEL.num_single_blocks,
        attention_head_dim=MODEL.head_dim,
        num_attention_heads=MODEL.num_attention_heads,
        joint_attention_dim=MODEL.text_dim,
        pooled_projection_dim=MODEL.vec_dim,
        guidance_embeds=False,
        axes_dims_rope=MODEL.axes_dim,
    )


def copy_weights(theirs: torch.nn.Module, chunks: Sequence[torch.nn.Module], *, context: ParallelContext) -> None:
    """Give our chunks diffusers' weights."""
    reader = CanonicalReader(StateDictReader(theirs.state_dict()), fmt="diffusers", model=MODEL)
    fill_parameters(chunks, reader.read, known=reader.shapes, model=MODEL, context=context)


def one_rank() -> ParallelContext:
    """Groups of a world of this process."""
    device = groups.choose_device("cpu")
    groups.start_world(device, timeout_minutes=1)
    return groups.initialize(ParallelConfig(), device=device, num_attention_heads=MODEL.num_attention_heads, seed=0)


def build() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, theirs) with the same random weights."""
    theirs = their_model()
    context = one_rank()
    chunks, _ = build_chunks(MODEL, ParallelConfig(), PrecisionConfig(dtype="fp32"), context=context)
    copy_weights(theirs, chunks, context=context)
    return chunks[0], theirs


def steps(ours: torch.nn.Module, theirs: torch.nn.Module, tokens: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """One forward and backward of each on the same inputs."""
    video = tokens - TEXT_TOKENS
    grid = (video // 64, 8, 8)
    torch.manual_seed(1)
    img, txt = torch.randn(video, MODEL.in_channels), torch.randn(TEXT_TOKENS, MODEL.text_dim)
    vec, t = torch.randn(1, MODEL.vec_dim), torch.tensor([0.4])
    ids = torch.cartesian_prod(*(torch.arange(float(extent)) for extent in grid))

    def our_step() -> torch.Tensor:
        pack = Pack([SampleShape(text_tokens=TEXT_TOKENS, grid=grid)], split=PackSplit())
        output = ours(ModelInputs(img=img, txt=txt, t=t, y_vec=vec, cond=None), pack)
        output.square().mean().backward()
        return output.detach()

    def their_step() -> torch.Tensor:
        output = theirs(
            hidden_states=img[None],
            encoder_hidden_states=txt[None],
            pooled_projections=vec,
            timestep=t,
            img_ids=ids,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
        ).sample
        output.square().mean().backward()
        return output.detach()[0]

    return our_step, their_step


def seconds(step: Callable[[], torch.Tensor]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def compare(first: Callable[[], torch.Tensor], second: Callable[[], torch.Tensor], pairs: int) -> list[float]:
    """Ratios first / second of alternating pairs; the order within a pair alternates too."""
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            below = seconds(second)
            above = seconds(first)
        else:
            above = seconds(first)
            below = seconds(second)
        ratios.append(above / below)
    return ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = build()
    rows = []
    for tokens in (320, 1024):
        our_step, their_step = steps(ours, theirs, tokens)
        gap = float((our_step() - their_step()).norm() / their_step().norm())
        compare(our_step, their_step, 3)
        for name, first in (("megasora / diffusers", our_step), ("diffusers / diffusers", their_step)):
            ratios = sorted(compare(first, their_step, arguments.pairs))
            median = statistics.median(ratios)
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            rows.append({"pair": name, "tokens": tokens, "ratio_median": median, "p10": low, "p90": high, "output_gap": gap})
            if not arguments.json:
                print(f"S {tokens:>5}  {name:<22} median {median:.3f}  p10 {low:.3f}  p90 {high:.3f}", flush=True)
    worst = max(row["ratio_median"] for row in rows if row["pair"].startswith("megasora"))
    print(json.dumps({"ratio_median": worst, "pairs": arguments.pairs, "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
