#!/usr/bin/env bash
# All that wants an NVIDIA GPU, in about 10 minutes: parity, timings, and five minutes of training (MINUTES=0: none).
#   bash benchmarks/gpu.sh [FOLDER]     results go to FOLDER, ./gpu-results by default
# Longer training, whose results are small enough to take home:
#   MINUTES=25 bash benchmarks/gpu.sh
# FLAGS="--seed 1" trains with constants other than those of `standard`.
# Needs what run.py needs, but neither pytest nor an account.
set -uo pipefail
out=$(realpath -m "${1:-gpu-results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
envs=${ENVS:-12}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/machine.txt"
"$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)' | tee -a "$out/machine.txt"

failed=0
step() {  # name, command ...: runs it, keeps its output, and goes on where it fails
    echo "== $1: ${*:2}"
    "${@:2}" 2>&1 | tee "$out/$1.txt" || { echo "== $1 FAILED"; failed=1; }
}

step parity env PYTHONPATH=".:tests:${PYTHONPATH:-}" "$python" -m unittest -v tests/test_cuda.py
step update_graphs "$python" benchmarks/update.py --preset standard --updates 50
step update_eager "$python" benchmarks/update.py --preset standard --updates 20 --cuda_graphs false
step update_eager_float32 "$python" benchmarks/update.py --preset standard --updates 20 --cuda_graphs false --precision float32
step update_paper "$python" benchmarks/update.py --preset paper --updates 50
step update_parts "$python" benchmarks/update.py --preset standard --updates 20 --cuda_graphs false --profile
step env "$python" benchmarks/env.py --rounds 1
# Without the action repeat, so that a control step costs a fifth of an update.
step loop "$python" benchmarks/loop.py --preset standard --action_repeat 1 --num_envs "$envs" --steps 12000 --log_every 1000

grep -h '^{' "$out"/*.txt
[ "${MINUTES:-5}" != 0 ] || exit $failed

run="$out/run"
echo "== train: ${MINUTES:-5} minutes of the standard preset ${FLAGS-}"
# shellcheck disable=SC2086  # flags are words
timeout --preserve-status --signal TERM "$((60 * ${MINUTES:-5}))" "$python" run.py --preset standard --num_envs "$envs" ${FLAGS-} \
    --wandb disabled --run_dir "$run" > "$out/train.txt" 2>&1
code=$?
[ $code -eq 0 ] || [ $code -eq 143 ] || { echo "== train FAILED ($code)"; failed=1; }
tail -n 5 "$out/train.txt"
rm -rf "$run/replay" "$run"/checkpoint*  # too big to take home; policy.pt, metrics.jsonl and videos stay
exit $failed
