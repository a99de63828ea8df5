"""The parts of a job file that are the same for every job: bash, as text.

What they rely on was seen on Slurm 22.05 (tests/slurm runs them there):
- The warning (--signal=USR1@S) and the SIGTERM of a preemption reach the ranks and not this script; of scancel and of the time limit both
  get a SIGTERM, and srun then kills the ranks at once. So saving is the ranks' business, and what comes next is read from what they left.
- A script that ends by itself in the grace time of its preemption is COMPLETED and never started again: it must requeue itself.
- A failed node: Slurm requeues the job itself and ends the script; nothing here has to notice.
- SLURM_RESTART_COUNT is not set the first time. srun does not take --cpus-per-task from sbatch (since 22.05). SLURM_NTASKS is that of the
  submission, also where the number of nodes was changed since; and without --ntasks-per-node srun fills one node after the other.
"""

PREPARE = r"""
mkdir -p -- "$RUN_DIR" || exit 1
RUN_DIR=$(cd -- "$RUN_DIR" >/dev/null && pwd) # where CDPATH is set cd says where it went
flags+=(--run_dir "$RUN_DIR")
[ -n "$MANIFEST" ] && flags+=(--data.manifest "$MANIFEST")
[ -n "$WEIGHTS" ] && flags+=(--init.weights "$WEIGHTS")
[ -n "$RUN" ] && flags+=(--init.run "$RUN")
""".strip()

ENCODERS = r"""
[ -n "$ENCODERS" ] && flags+=(--encoders.vae "$ENCODERS/hunyuan-vae" --encoders.t5 "$ENCODERS/t5-v1_1-xxl"
    --encoders.clip "$ENCODERS/clip-vit-large-patch14")
""".strip()

LPIPS = r"""
[ -n "$LPIPS" ] && flags+=(--loss.lpips "$LPIPS")
""".strip()

ATTEMPT = r"""
restarts=${SLURM_RESTART_COUNT:-0}
crashes_file=$RUN_DIR/.crashes
[ "$restarts" -gt 0 ] || rm -f "$crashes_file" # someone has submitted it anew
# where a rank that meets a user's mistake says so: its exit code may drown in those of the ranks that are ended with it
export MEGASORA_MISTAKE_FILE=$RUN_DIR/.mistake
rm -f "$MEGASORA_MISTAKE_FILE"
ends=$(SLURM_TIME_FORMAT=standard squeue -h -j "$SLURM_JOB_ID" -o %e) # of this attempt, by its time limit
case $ends in [0-9]*-*T*) ends=$(date -d "$ends" +%s 2>/dev/null) ;; *) ends="" ;; esac # N/A; or no answer, which date takes for midnight
ends=${ends:-99999999999}
saved_step() { # of the newest complete checkpoint: what the tracker names, or what lost its writer before it was named
    local root=$RUN_DIR/checkpoints named manifest step=0
    named=$(cat "$root/latest" 2>/dev/null)
    for manifest in "$root"/step_*/manifest.json; do
        [[ $manifest =~ /step_0*([0-9]+)/manifest\.json$ ]] || continue
        [ "$manifest" -nt "$root/latest" ] || [ "$manifest" = "$root/$named/manifest.json" ] || continue
        step=${BASH_REMATCH[1]}
    done
    echo "$step"
}
last_step() { # recorded or saved: the last step is saved before it is recorded, and a full disk costs records
    local found saved
    found=$(grep -o '^{"step": [0-9]*[,}]' "$RUN_DIR/metrics.jsonl" 2>/dev/null | tail -n1 | tr -dc 0-9)
    saved=$(saved_step)
    [ "${found:-0}" -gt "$saved" ] && saved=$found
    echo "$saved"
}
began=-1 # where the next attempt would begin, had this one done nothing; after the first there is always another
[ "$restarts" -eq 0 ] || began=$(saved_step)
no_further() { # restarts without end are for those that come further
    [ "$restarts" -ge "$MAX_RESTARTS" ] && [ "$(saved_step)" -le "$began" ]
}
verdict() { # why this attempt ended, for the log and for `megasora slurm status`
    echo "$(date -Is) job $SLURM_JOB_ID restart $restarts step $(last_step): $1" | tee -a "$RUN_DIR/restarts.log"
}
requeue() {
    for _ in 1 2 3 4 5; do
        scontrol requeue "$SLURM_JOB_ID" && return
        sleep 10
    done
}
""".strip()

RENDEZVOUS = r"""
# Ranks meet at the first node; the port is the job's and the restart's own, so that no rank that outlived its node joins the next attempt.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)}
export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 31 + restarts) % 15000))
# One hardware queue, so that a tensor-parallel gather is launched before the product that waits for it (Megatron-core, before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# NCCL: a rank that fails names its peer and the reason. A collective that hangs is ended after --parallel.timeout_minutes (30), as a crash.
# Its other defaults suit one fabric; what to export before sbatch where they do not:
#   NCCL_SOCKET_IFNAME=ib0   network of the first handshake, where a node has several (GLOO_SOCKET_IFNAME for checkpoints)
#   NCCL_IB_HCA=mlx5         adapters that carry the data, where some belong to the storage
#   NCCL_IB_TIMEOUT=22       large fabrics: wait 4.1 us x 2^22 = 17 s for a lost packet instead of 4 s (20), before giving up
#   NCCL_DEBUG=INFO          what it chose: adapters, rings, GPUDirect
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
""".strip()

SRUN = r"""
# Signals are ignored until megasora handles them, some seconds after its start: they would end a rank that still imports.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks_per_node)) --ntasks-per-node="$ranks_per_node" \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1 TERM; exec megasora train "$@"' megasora "$recipe" "${flags[@]}" "$@" &
launcher=$!
""".strip()

TORCHRUN = r"""
# One torchrun a node. It starts all ranks again, where they are, when one crashes (three times; then the job is requeued). Warnings are the
# ranks' business: torchrun would end them after 30 s, so it must not notice, nor may a rank that still imports.
MAX_ELASTIC_RESTARTS=${MAX_ELASTIC_RESTARTS:-3}
export ranks_per_node MAX_ELASTIC_RESTARTS
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1 TERM; exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks_per_node" \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --max-restarts="$MAX_ELASTIC_RESTARTS" --signals-to-handle=SIGINT -m megasora train "$@"' \
    torchrun "$recipe" "${flags[@]}" "$@" &
launcher=$!
""".strip()

WAIT = r"""
# bash runs a trap between commands only, and a signal ends `wait`: wait again as long as that was it.
signals=0
terminated() {
    signals=$((signals + 1))
    [ "$(date +%s)" -lt "$ends" ] && return
    # at the time limit there is no later: Slurm kills this script in a few seconds
    if no_further; then
        verdict "time limit, before the ranks had ended; not requeued: no new checkpoint after $MAX_RESTARTS restarts"
    else
        verdict "time limit, before the ranks had ended; requeued"
        requeue
    fi
}
trap terminated TERM
trap 'signals=$((signals + 1)); scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # warned alone (--signal=B:USR1): pass it on to the ranks
while seen=$signals; wait "$launcher"; code=$?; [ "$signals" -ne "$seen" ]; do :; done
""".strip()

VERDICT = r"""
step=$(last_step) steps=$(sed -n '/^train:$/,/^[^ ]/s/^  steps: //p' "$RUN_DIR/config.yaml" 2>/dev/null)
job_state() { # a controller that does not answer is asked again
    local found
    for _ in 1 2 3 4 5; do
        found=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p')
        [ -n "$found" ] && break
        sleep 10
    done
    echo "${found:-RUNNING}"
}
if [ "$code" -eq 0 ] && [ "$step" -ge "${steps:-0}" ]; then
    verdict "finished"
elif [ -s "$MEGASORA_MISTAKE_FILE" ] || [ "$code" -eq 2 ]; then
    verdict "not requeued: a mistake that another try would repeat; its cure is above"
    code=2
elif [ "$(job_state)" != RUNNING ]; then
    verdict "ended from outside" # scancel; or a node failed, and Slurm has requeued the job already
elif [ "$code" -eq 0 ] || [ "$signals" -gt 0 ]; then
    rm -f "$crashes_file"
    if no_further; then
        verdict "not requeued: stopped without a new checkpoint after $MAX_RESTARTS restarts (exit code $code)"
        [ "$code" -ne 0 ] || code=1 # it has not finished
    else
        verdict "stopped as asked (preemption or the time limit), requeued"
        requeue
    fi
else # a crash: again, unless crashes follow each other without getting anywhere
    crashes=0 best=-1
    [ -f "$crashes_file" ] && read -r crashes best <"$crashes_file"
    if [ "$step" -gt "$best" ]; then crashes=1 best=$step; else crashes=$((crashes + 1)); fi
    echo "$crashes $best" >"$crashes_file"
    if [ "$crashes" -ge "$MAX_CRASHES" ]; then
        verdict "not requeued: crash $crashes in a row without a new step (exit code $code)"
    elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        verdict "not requeued: crash (exit code $code) after $MAX_RESTARTS restarts"
    else
        verdict "crash (exit code $code), requeued"
        requeue
    fi
fi
exit $code
""".strip()
