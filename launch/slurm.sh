#!/usr/bin/env bash
# Train a run under Slurm, one task a GPU, and queue it again until it is done:
#
#     sbatch --nodes=16 --job-name=mine launch/slurm.sh launch/curriculum.py --config my.yaml
#
# Start it in this project's folder; the run's folder has to be on a disk that all nodes share. Slurm signals the ranks
# 5 to 6 minutes before the time is over; they save and exit, and the job queues itself again. It also does so if ranks
# were killed, but not if the run failed or was cancelled, or if three starts in a row have made no new checkpoint.
# Options of sbatch override those below: --cpus-per-task should be a node's cores divided by its GPUs.
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
FRUITLESS=3 # starts in a row without a new checkpoint

# The resolved config gives the run's folder; a mistake in the config ends the job here, with its sentence.
folder='import sys, yaml; config = yaml.safe_load(sys.stdin); print(config["root"], config["name"], sep="/")'
config=$(python "$@" --print_config) && run=$(python -c "$folder" <<<"$config") || exit 2

progress() { # How far the run has come: the names of its checkpoints and finished models.
    (shopt -s nullglob && cd "$run" && echo "job $SLURM_JOB_ID from:" */checkpoints/step_* */model)
}
mkdir -p "$run"
progress >>"$run/starts.log"
rm -f "$run/outcome.json"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck disable=SC2016  # each task expands its own variables
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
elif (($(grep -cxF "$(progress)" "$run/starts.log") >= FRUITLESS)); then
    echo "job $SLURM_JOB_ID: $FRUITLESS starts have brought no checkpoint, see $run/starts.log: giving up"
    exit 1
fi
echo "job $SLURM_JOB_ID: queued again"
scontrol requeue "$SLURM_JOB_ID"
