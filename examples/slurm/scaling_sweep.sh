#!/bin/bash
# Weak scaling: the same work a GPU on more and more nodes. `submit` renders and submits a job for each number of nodes, `table` reads what
# they measured: median of tokens/s and model FLOPs over the steps after the first ten, and the efficiency against the fewest nodes.
#
#   NODES="1 2 4 8 16 28" MANIFEST=clips.parquet ENCODERS=weights examples/slurm/scaling_sweep.sh submit [--account A --partition P ...]
#   examples/slurm/scaling_sweep.sh table
#
# RECIPE (opensora2_stage1), GPUS_PER_NODE (8), TOKENS_PER_GPU (26880, three clips of 129 frames at 256px), STEPS (40), SWEEP (runs/scaling).
# More arguments go to megasora slurm render, so a layout is compared by --parallel.tensor_model_parallel_size 2 and another SWEEP.

set -euo pipefail
: "${RECIPE:=opensora2_stage1}" "${NODES:=1 2 4 8 16 28}" "${GPUS_PER_NODE:=8}" "${TOKENS_PER_GPU:=26880}" "${STEPS:=40}"
: "${SWEEP:=$PWD/runs/scaling}"
what=${1:-}
shift || true
case $what in
submit)
    mkdir -p "$SWEEP"
    for nodes in $NODES; do
        file=$SWEEP/nodes_$nodes.sbatch
        megasora slurm render "$RECIPE" --nodes "$nodes" --gpus_per_node "$GPUS_PER_NODE" --output "$file" --time 01:00:00 \
            --run_dir "$SWEEP/nodes_$nodes" --train.steps "$STEPS" --data.global_tokens $((nodes * GPUS_PER_NODE * TOKENS_PER_GPU)) \
            --checkpoint.interval_steps 0 --checkpoint.keep 1 --train.no_tensorboard "$@"
        sbatch "$file"
    done
    ;;
table)
    python3 - "$SWEEP" <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

rows = []
for file in Path(sys.argv[1]).glob("nodes_*/metrics.jsonl"):
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    steady = [step for step in steps if step["step"] > 10 and not step["events"]] or steps
    nodes = int(file.parent.name.removeprefix("nodes_"))
    rows.append((nodes, *(statistics.median(step[name] for step in steady) for name in ("tokens_per_s", "tflops_per_gpu", "data_wait_s"))))
print("| nodes | tokens/s | TFLOP/s a GPU | data wait, s | efficiency |\n|---|---|---|---|---|")
for nodes, tokens, tflops, wait in sorted(rows):
    first = min(rows)
    print(f"| {nodes} | {tokens:,.0f} | {tflops:.1f} | {wait:.2f} | {tokens / nodes / (first[1] / first[0]):.1%} |")
PYTHON
    ;;
*)
    echo "scaling_sweep.sh submit [flags of megasora slurm render] | table" >&2
    exit 2
    ;;
esac
