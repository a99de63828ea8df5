#!/bin/bash
# One run on three layouts, on the CPU: 4 ranks as TP2 x PP2, then 2 as CP2, then 1. Noise, timesteps and data order do not know the layout,
# so the loss curve goes on as if nothing had happened. About two minutes on two cores.
set -euo pipefail
run=${OUT:-$(mktemp -d)}/run
flags=(--run_dir "$run" --device cpu --evaluation.interval_steps 0)
torchrun --nproc-per-node 4 -m megasora train tiny "${flags[@]}" --train.steps 4 \
    --parallel.tensor_model_parallel_size 2 --parallel.pipeline_model_parallel_size 2
torchrun --nproc-per-node 2 -m megasora train tiny "${flags[@]}" --train.steps 8 --parallel.context_parallel_size 2
megasora train tiny "${flags[@]}" --train.steps 10
python -c '
import json, sys
for line in open(sys.argv[1]):
    step = json.loads(line)
    print("step", step["step"], "loss", round(step["loss"], 4), [event["event"] for event in step["events"]])
' "$run/metrics.jsonl"
