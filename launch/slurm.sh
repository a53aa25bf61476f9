#!/usr/bin/env bash
# Train a run under Slurm, one task a GPU, and queue it again until it is done:
#
#     sbatch --nodes=16 --job-name=mine launch/slurm.sh launch/curriculum.py --config my.yaml
#
# Start it in this project's folder; the run's folder has to be on a disk that all nodes share. Slurm tells the ranks
# 5 to 6 minutes before the time is over; they save and leave, and the job queues itself again. It does so as well where
# ranks were killed, but not where the run failed or was cancelled, or where three starts in a row have brought no new
# checkpoint. Options of sbatch count more than those below: --cpus-per-task should be a node's cores over its GPUs.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -uo pipefail
FRUITLESS=3

# The resolved config says where the run lies; a mistake in it ends the job here, with its sentence.
folder='import sys, yaml; config = yaml.safe_load(sys.stdin); print(config["root"], config["name"], sep="/")'
config=$(python "$@" --print_config) && run=$(python -c "$folder" <<<"$config") || exit 2

place() { # What the run has got to: the names of its checkpoints and finished models.
    (shopt -s nullglob && cd "$run" && echo "job $SLURM_JOB_ID from:" */checkpoints/step_* */model)
}
mkdir -p "$run"
place >>"$run/starts.log"
rm -f "$run/outcome.json"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck disable=SC2016  # each task has numbers of its own
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} exec python -u "$@"' rank "$@"
code=$?

outcome=$(grep -os '"outcome": *"[a-z]*"' "$run/outcome.json" | cut -d '"' -f 4)
echo "job $SLURM_JOB_ID: srun ended with $code, outcome: ${outcome:-none}"
if ((code == 0)) || [[ $outcome == "done" ]]; then
    exit 0
elif ((code == 2)) || [[ $outcome == "failed" ]]; then
    exit "$code"
elif (($(grep -cxF "$(place)" "$run/starts.log") >= FRUITLESS)); then
    echo "job $SLURM_JOB_ID: $FRUITLESS starts have brought no checkpoint, see $run/starts.log: giving up"
    exit 1
fi
echo "job $SLURM_JOB_ID: queued again"
scontrol requeue "$SLURM_JOB_ID"
