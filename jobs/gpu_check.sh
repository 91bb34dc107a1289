#!/usr/bin/env bash
# Checks and measures this machine's GPU, and leaves a table: runs/gpu_check/table.md.
#
#     jobs/gpu_check.sh                   all parts, for as long as MINUTES (12) lets it begin another one
#     jobs/gpu_check.sh tests-2 links     these parts only
#
# A part that is done is not done again: call it once more for what is left, remove runs/gpu_check to begin anew.
# NANOGPT=FOLDER, of a checkout of nanoGPT: beside ours in parts of its own.
# Ranks share the GPU where there are more of them than GPUs. MPIRUN: what starts ranks, with its options.
# MPILM_CHECK_DEVICE=host plays it without a GPU, as the tests do.
set -euo pipefail
[ -z "${NANOGPT:-}" ] || NANOGPT=$(realpath "$NANOGPT")
export NANOGPT=${NANOGPT:-}
cd "$(dirname "$0")/.."

out=runs/gpu_check
device=${MPILM_CHECK_DEVICE:-cuda}
read -ra mpirun <<<"${MPIRUN:-mpirun}"
deadline=$((${MINUTES:-12} * 60))
parts=(facts links steps-124m tests-2 steps-350m tests-1 bits steps-1300m shared-350m tests-4 reproducible-350m fp8-350m graphs-124m)
[ -z "$NANOGPT" ] || parts+=(nanogpt-124m nanogpt-350m nanogpt-1300m)
MOST=150 # seconds of a part
mkdir -p "$out"

ranks() { # number of ranks, module, arguments
    "${mpirun[@]}" -np "$1" python -m "${@:2}"
}

facts() {
    date -u '+%Y-%m-%d'
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || echo "no nvidia-smi"
    python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "HIP", torch.version.hip)'
    python -c 'import cupy; print("cupy", cupy.__version__)' || echo "no CuPy"
    python -m mpi4py --mpi-lib-version | head -1
}

bits() { # the same losses and weights at 1, 2 and 4 ranks
    local size
    for size in 1 2 4; do
        rm -rf "$out/run-$size"
        ranks "$size" mpilm.train --run.dir "$out/run-$size" --run.device "$device" --run.share_gpu true \
            --run.steps 8 --run.compile off --log.tensorboard false --log.validate_every 0 >&2
        python -m mpilm.inspect "$out/run-$size" --json | tr ',' '\n' | grep -i sha256 | head -1
    done | tee /dev/stderr | sort -u | wc -l | grep -qx 1
    echo "the same bits at 1, 2 and 4 ranks"
}

one() { # what a part runs
    case $1 in
        tests-*) ranks "${1#tests-}" pytest -q -m gpu tests/comm/test_contract.py tests/test_gpu.py ;;
        links) ranks 2 mpilm.bench gpu --part links --rounds 5 --json ;;
        steps-*) ranks 1 mpilm.bench gpu --part steps --case "${1#steps-}" --rounds 3 --steps 4 --peer --json ;;
        nanogpt-*)
            ranks 1 mpilm.bench gpu --part steps --case "${1#*-}" --rounds 3 --steps 4 --nanogpt "${NANOGPT:?}" --json ;;
        shared-*) ranks 2 mpilm.bench gpu --part steps --case "${1#shared-}" --rounds 3 --steps 4 --json ;;
        reproducible-*)
            ranks 1 mpilm.bench gpu --part steps --case "${1#*-}" --rounds 3 --steps 4 --reproducible --json ;;
        fp8-*) ranks 1 mpilm.bench gpu --part steps --case "${1#fp8-}" --rounds 3 --steps 4 --fp8 --json ;;
        graphs-*) ranks 1 mpilm.bench gpu --part steps --case "${1#graphs-}" --rounds 3 --steps 4 --graphs --json ;;
        facts | bits) "$1" ;;
        *) echo "$1: no such part; there are ${parts[*]}" >&2 && return 2 ;;
    esac
}

table() {
    echo "| part | case | who | value | unit |"
    echo "|---|---|---|---|---|"
    local part row='s/^{"bench": "gpu", "case": "\(.*\)", "who": "\(.*\)", "value": \(.*\), "unit": "\(.*\)"}$/| \1 | \2 | \3 | \4 |/p'
    for part in "${parts[@]}"; do
        if [ ! -e "$out/$part.done" ]; then
            echo "| $part | not done | | | |"
        elif grep -q '^{"bench"' "$out/$part.txt"; then
            sed -n "$row" "$out/$part.txt" | sed "s/^/| $part /"
        elif [ "$part" = facts ]; then
            sed 's/^/| facts | /; s/$/ | | | |/' "$out/$part.txt"
        else
            echo "| $part | $(cat "$out/$part.done"): $(tail -1 "$out/$part.txt" | tr -d '|') | | | |"
        fi
    done
}

if [ "${1:-}" = --part ]; then # by itself, so that it can be ended with all that it has started
    one "$2"
    exit
fi

[ $# -gt 0 ] || set -- "${parts[@]}"
for part in "$@"; do
    [ ! -e "$out/$part.done" ] || continue
    left=$((deadline - SECONDS))
    [ "$left" -gt 30 ] || { echo "time is up before $part: call again for the rest" && break; }
    echo "== $part"
    code=0
    timeout -k 10 "$((left < MOST ? left : MOST))" jobs/gpu_check.sh --part "$part" \
        >"$out/$part.txt" 2>"$out/$part.err" </dev/null || code=$?
    case $code in
        0) echo passed >"$out/$part.done" ;;
        124 | 137) echo "   ran too long; the next call tries it again, $out/$part.err says how far it got" ;;
        *) echo "FAILED with $code" >"$out/$part.done" && tail -3 "$out/$part.err" ;;
    esac
done
table >"$out/table.md"
cat "$out/table.md"
