#!/usr/bin/env bash
# All checks and measurements on a machine with a CUDA GPU, in one command and at most BUDGET seconds (540): bench/gpu.sh
#
# No variant is timed before its own check passed. A failed test is reported and the run goes on; a tile of the table that
# computes wrong results, or a bad memory access, ends the timing. Needs no installation: it runs its own checkout, with
# PYTHONPATH. A stage whose packages are not installed is left out, and the summary names them. Variables:
#   STAGES          A (the default), B, C or names of stages, see below: STAGES="preflight kernels"
#   OUT             where the results go (bench/results): gpu-DEVICE.tar.gz with all of them, packed anew after every
#                   stage, gpu-DEVICE.txt, the summary, gpu-DEVICE.log, and what `tune` found, tiles-DEVICE.json
#   TILES           a table to begin with, such as that one: copied over kernels/tiles.json
#   PROCESSES       of the tests (12)
#   PYTHON          the interpreter (python3)
#   FASTDLP_COMMIT  what the results name as their commit, for a copy without history
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

declare -A presets=(
    [A]="preflight tiles tests memcheck kernels round profile ncu"
    [B]="preflight tune tiles kernels round"
    [C]="preflight baselines text racecheck"
)
known=(preflight tiles tests memcheck tune kernels round profile ncu baselines text racecheck)

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-540}
OUT=${OUT:-bench/results}
STAGES=${STAGES:-A}
PROCESSES=${PROCESSES:-12}
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer and ncu
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-140}

die() {
    echo "bench/gpu.sh: $1" >&2
    exit 2
}

stages=()
for name in $STAGES; do
    if [[ -v presets[$name] ]]; then
        read -ra more <<<"${presets[$name]}"
        stages+=("${more[@]}")
    elif [[ " ${known[*]} " == *" $name "* ]]; then
        stages+=("$name")
    else
        die "unknown stage $name: choose from ${!presets[*]} ${known[*]}"
    fi
done
device=$("$PYTHON" -c '
import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-"))
' 2>/dev/null) || die "torch sees no CUDA GPU here (PYTHON=$PYTHON); run it on a machine with one"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && log=$OUT/gpu-$device.log && : >"$log" || exit 2
work=$(mktemp -d) || exit 2 # all files of the run: on some machines only a few come back, so they travel in one archive
trap 'rm -rf "$work"' EXIT

summary=()
failed=0
wrong= # the stage that found a kernel wrong

say() { echo "$@" | tee -a "$log"; }
note() { summary+=("$(printf '%-12s %s' "$1" "$2")"); }
has() { "$PYTHON" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)" 2>/dev/null; }

# needs STAGE PACKAGE...: whether all of them are installed; what is missing goes to the summary.
needs() {
    local name=$1 package missing=()
    shift
    for package; do has "$package" || missing+=("$package"); done
    ((${#missing[@]} == 0)) || note "$name" "left out: not installed: ${missing[*]}"
    ((${#missing[@]} == 0))
}

# tool STAGE PROGRAM: the same for a program.
tool() {
    command -v "$2" >/dev/null || note "$1" "left out: $2 is not on the PATH"
    command -v "$2" >/dev/null
}

pack() {
    printf '%s\n' "== $device, $SECONDS s; all results in $OUT/gpu-$device.tar.gz" "${summary[@]}" >"$work/summary.txt"
    cp "$log" "$work/log.txt"
    cp "$work/summary.txt" "$OUT/gpu-$device.txt"
    tar -czf "$OUT/gpu-$device.tar.gz" -C "$work" .
}

# stage NAME SECONDS COMMAND...: its output to the screen, the log and a file; its end to the summary; its status on.
stage() {
    local name=$1 cap=$2 from=$SECONDS left=$((BUDGET - SECONDS)) rc
    shift 2
    if ((left < 5)); then
        note "$name" "not begun: $BUDGET s are over"
        failed=1
        return 124
    fi
    ((cap > left)) && cap=$left
    say "== $name: $(cut -c 1-300 <<<"$*")"
    timeout -k 5 "$cap" "$@" 2>&1 | tee -a "$log" "$work/$name.txt"
    rc=${PIPESTATUS[0]}
    case $rc in
    0) note "$name" "ok, $((SECONDS - from)) s" ;;
    124 | 137) note "$name" "RAN OUT of its $cap s" ;;
    *) note "$name" "FAILED with exit code $rc after $((SECONDS - from)) s" ;;
    esac
    ((rc == 0)) || failed=1
    return "$rc"
}

# timed STAGE ARGUMENTS...: a stage that measures, not after a kernel was found wrong.
timed() {
    if [[ $wrong ]]; then
        note "$1" "not begun: $wrong found a kernel wrong"
        failed=1
    else
        stage "$@"
    fi
}

# -- the stages ---------------------------------------------------------------------------------------------

bench=("$PYTHON" -m fastdlp bench)
clocks=name,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu
each_tile=("$PYTHON" -m fastdlp.bench.each_tile)

pytest() {
    local processes=(-n "$PROCESSES")
    has xdist || processes=()
    has xdist || say "pytest-xdist is not installed: one process"
    # Without pyproject's addopts, one of which needs pytest-benchmark.
    stage "$1" "$2" "$PYTHON" -m pytest -q -rfE -o addopts= -p no:cacheprovider --maxfail=30 --durations=10 \
        "${processes[@]}" "${@:3}"
}

run_tests() {
    local files=(tests/test_cuda.py tests/test_dual_lora_launch.py tests/test_dual_lora_ops.py tests/test_half_blocks.py
        tests/test_short_attention.py tests/test_adamw.py)
    local clip=(tests/test_tower.py tests/test_module.py tests/test_engine.py tests/test_memory.py tests/test_backends.py)
    local training=(test_training_follows_the_cpu test_same_bits_every_run test_graphs_follow_the_plain_steps
        test_no_step_waits_for_the_host)
    local left=() name
    if has open_clip; then
        files+=("${clip[@]}")
    else
        left=(test_memory_stays_within_its_estimate)
        note tests "left out: not installed: open_clip, for ${clip[*]#tests/}"
    fi
    if ! { has open_clip && has sklearn; }; then
        left+=("${training[@]}")
        note tests "left out: not installed: open_clip or sklearn, for training in test_cuda.py"
    fi
    for name in "${left[@]}"; do files+=(--deselect "tests/test_cuda.py::$name"); done
    pytest tests 180 "${files[@]}"
}

run_tune() {
    local seconds=$((BUDGET - SECONDS < 300 ? BUDGET - SECONDS : 300)) minutes
    seconds=$((seconds > 45 ? seconds - 25 : 20)) # it ends by itself
    printf -v minutes '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60))
    timed tune 300 "${bench[@]}" tune --dtype bf16 --minutes "$minutes"
    cp kernels/tiles.json "$work/tiles.json" && cp kernels/tiles.json "$OUT/tiles-$device.json"
}

run_round() {
    local name=$1 cap=$2
    shift 2
    timed "$name" "$cap" "${bench[@]}" round --clients 10 --precision bf16 --output "$work/$name.json" "$@"
}

run() {
    case $1 in
    preflight)
        stage preflight 60 "$PYTHON" -m torch.utils.collect_env
        ! command -v nvidia-smi >/dev/null || nvidia-smi --query-gpu="$clocks" --format=csv 2>&1 | tee -a "$log"
        ;;
    tiles)
        if needs tiles pytest; then
            pytest tiles 120 tests/test_each_tile.py
            [[ $? != 1 ]] || wrong=tiles # another code: not begun, or not through
        fi
        ;;
    tests) needs tests pytest && run_tests ;;
    memcheck)
        if tool memcheck compute-sanitizer; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 90 compute-sanitizer --error-exitcode 99 "${each_tile[@]}"
            [[ $? != 99 ]] || wrong=memcheck # another code: the tool did not get that far here
        fi
        ;;
    tune) run_tune ;;
    kernels)
        timed kernels 90 "${bench[@]}" kernels --model ViT-B-32 --clients 10 --clients 1 --milliseconds 50 \
            --output "$work/kernels.json"
        ;;
    round)
        needs round open_clip && run_round round 120 --steps 2 --repeats 3 --without-peft --backend torch \
            --backend triton --only fastdlp --only pre-update
        ;;
    profile)
        needs profile open_clip &&
            timed profile 60 "${bench[@]}" profile --clients 10 --backend triton --output "$work/profile.json"
        ;;
    ncu)
        tool ncu ncu && timed ncu 75 ncu --clock-control none --profile-from-start off --set full \
            --log-file "$work/ncu-details.txt" "${each_tile[@]}" --large 5
        ;;
    baselines)
        needs baselines open_clip peft transformers && run_round baselines 300 --steps 1 --repeats 2 \
            --backend triton --only peft --only autocast --only strongest --only paper --only fastdlp
        ;;
    text) needs text open_clip && run_round text 60 --encoder text --steps 2 --repeats 3 ;;
    racecheck) # reports hazards that are none in Triton's reductions (triton #7264), so it decides nothing
        tool racecheck compute-sanitizer && local before=$failed &&
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage racecheck 90 compute-sanitizer --tool racecheck "${each_tile[@]}"
        failed=${before:-$failed}
        ;;
    esac
}

if [[ ${TILES:-} ]]; then
    "$PYTHON" -m json.tool "$TILES" /dev/null && cp "$TILES" kernels/tiles.json || die "TILES=$TILES is no tile table"
    say "kernels/tiles.json is now $TILES"
fi
for name in "${stages[@]}"; do
    run "$name"
    pack
done
tee -a "$log" <"$work/summary.txt"
exit $failed
