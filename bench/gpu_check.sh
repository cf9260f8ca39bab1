#!/bin/bash
# What a GPU is wanted for, in order of value. Each part is a process of its own with its own time limit, and its results
# are kept at once: one that fails or hangs takes no other with it.
#   bash bench/gpu_check.sh                                       everything, within $BUDGET seconds (575)
#   PARTS="facts tests step" BUDGET=300 bash bench/gpu_check.sh   some parts
#   TINY=--tiny bash bench/gpu_check.sh                           rehearses on a CPU
# Results: $OUT/results.jsonl, peer.jsonl, log.txt, tests.xml, profile.txt, trace.json.gz (OUT=runs/gpu-check).
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-runs/gpu-check} PYTHONPATH=$PWD/src:$PWD PYTHONUNBUFFERED=1
# What `make gpu-site` collected is for this Python only.
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' && PYTHONPATH=$PWD/.site:$PYTHONPATH
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton
mkdir -p "$OUT"
touch "$OUT/results.jsonl"
before=$(wc -l <"$OUT/results.jsonl")
end=$((SECONDS + ${BUDGET:-575}))
nvidia-smi >"$OUT/log.txt" 2>&1

declare -A limit=(
  [facts]=45 [resume]=30 [step]=170 [tests]=150 [attention]=110 [islands]=60 [lora]=30 [small]=60 [peer]=110
  [eager]=60 [oom]=60 [nf4]=110
)
for part in ${PARTS:-facts resume step tests attention islands lora small peer eager oom nf4}; do
  left=$((end - SECONDS))
  most=${limit[$part]:-60}
  [ "$left" -lt 20 ] && { echo "$part: no time left"; continue; }
  [ "$left" -lt "$most" ] && most=$left
  case $part in
    tests) command=(env TORCHINDUCTOR_COMPILE_THREADS=2 "$PYTHON" -m pytest tests/training/test_gpu.py -n 8 --dist load
      -p no:cacheprovider --durations=12 --junitxml="$OUT/tests.xml") ;;
    peer) command=(bash -c "yes go | '$PYTHON' -m bench.gpu_check.peer $TINY") ;;
    *) command=("$PYTHON" -m bench.gpu_check "$part" $TINY) ;;
  esac
  began=$SECONDS
  timeout -k 5 "$most" "${command[@]}" >"$scratch/part.log" 2>&1
  code=$?
  { echo "==== $part"; cat "$scratch/part.log"; } >>"$OUT/log.txt"
  echo "== $part: rc $code, $((SECONDS - began)) s of $most"
  [ "$part" = peer ] && grep '"event"' "$scratch/part.log" | tee -a "$OUT/peer.jsonl" | cut -c1-200
  [ "$part" = tests ] && grep -E '^(FAILED|ERROR)|passed|failed|skipped' "$scratch/part.log" | cut -c1-260 | tail -14
  [ "$code" != 0 ] && [ "$part" != tests ] && tail -3 "$scratch/part.log" | cut -c1-260
done
tail -n "+$((before + 1))" "$OUT/results.jsonl" | sed -E 's/"at": [0-9.]+, //' | cut -c1-330
