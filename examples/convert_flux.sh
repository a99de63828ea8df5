#!/bin/bash
# FLUX.1-dev -> a start for Open-Sora v2 -> its release file -> diffusers, every step proved. Without an argument it makes a thin random
# FLUX with all names (about a minute on a laptop); with one it takes that file: examples/convert_flux.sh flux1-dev.safetensors
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$(mktemp -d)}
axes=()
flux=${1:-}
if [ -z "$flux" ]; then
    flux=$out/flux.safetensors
    python "$here/benchmarks/convert/make_flux.py" "$flux" --small
    axes=(--axes_dim 4 14 14) # a thin model's rotary dims are not FLUX's
fi
megasora inspect "$flux"
megasora convert "$flux" "$out/start" --to megasora --init open-sora-v2 --verify "${axes[@]}"
megasora convert "$out/start" "$out/open_sora_v2.safetensors" --to opensora --verify
megasora convert "$out/open_sora_v2.safetensors" "$out/transformer" --to diffusers --shard_gb 5 --verify "${axes[@]}"
megasora inspect "$out/transformer"
echo "everything is in $out"
