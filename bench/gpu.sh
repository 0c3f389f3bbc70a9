#!/usr/bin/env bash
# What a machine with a CUDA GPU is asked for, in one command and at most BUDGET seconds (540): bench/gpu.sh
#
# Correctness comes first, and nothing is timed after a red test. Needs no installation: it runs the checkout that it
# lies in. Variables:
#   OUT             where the results and the log go (bench/results)
#   TUNE=1          measure kernels/tiles.json anew before anything else is timed
#   PYTHON          the interpreter (python3)
#   FASTDLP_COMMIT  what the results name as their commit, for a copy without history
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-540}
OUT=${OUT:-bench/results}
export PYTHONPATH=. PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-140}

device=$("$PYTHON" -c '
import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-"))
' 2>/dev/null) || {
    echo "bench/gpu.sh: torch sees no CUDA GPU here (PYTHON=$PYTHON); run it on a machine with one" >&2
    exit 2
}
mkdir -p "$OUT" || exit 2
log=$OUT/gpu-$device.log
: >"$log" || exit 2
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

summary=()
failed=0
note() { summary+=("$(printf '%-24s %s' "$1" "$2")"); }

# stage NAME SECONDS COMMAND...: its output to the screen and the log, its end to the summary, its exit status on.
stage() {
    local name=$1 cap=$2 from=$SECONDS left=$((BUDGET - SECONDS)) rc
    shift 2
    if ((left < 15)); then
        note "$name" "not begun: $BUDGET s are over"
        failed=1
        return 124
    fi
    ((cap > left)) && cap=$left
    echo "== $name: $*" | cut -c 1-200 | tee -a "$log"
    timeout -k 5 "$cap" "$@" 2>&1 | tee -a "$log"
    rc=$?
    case $rc in
    0) note "$name" "ok, $((SECONDS - from)) s" ;;
    124 | 137)
        note "$name" "RAN OUT of its $cap s"
        failed=1
        ;;
    *)
        note "$name" "FAILED with exit code $rc after $((SECONDS - from)) s"
        failed=1
        ;;
    esac
    return $rc
}

finish() {
    printf '%s\n' "== $device, $SECONDS s; results in $OUT" "${summary[@]}" | tee -a "$log"
    exit "$1"
}

# -- correct? -----------------------------------------------------------------------------------------------

tests=(tests/test_cuda.py tests/test_dual_lora_launch.py tests/test_dual_lora_ops.py tests/test_adamw.py
    tests/test_tower.py tests/test_module.py tests/test_engine.py tests/test_memory.py)
if ! has sklearn; then
    for name in test_training_follows_the_cpu test_same_bits_every_run test_graphs_follow_the_plain_steps \
        test_no_step_waits_for_the_host; do
        tests+=(--deselect "tests/test_cuda.py::$name")
    done
    note "tests of training" "left out: scikit-learn, which holds their data, is not installed"
else
    tests+=(tests/test_backends.py)
fi
# The options of pyproject.toml name a plugin that may be missing here.
stage tests 240 "$PYTHON" -m pytest -q -o addopts= -p no:cacheprovider -x "${tests[@]}" || {
    note "the rest" "not begun: no speed on a red or unfinished test"
    finish 1
}

operator='
import torch
from fastdlp.kernels.dual_lora import Norm, RowGroups, dual_lora

groups = RowGroups((63, 0, 5, 100), views=2)
for dtype in (torch.bfloat16, torch.float32):
    for parts, activation in ((3, "none"), (1, "quick_gelu")):
        def randn(*shape, dtype=dtype):
            return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        x, A, B = randn(336, 136), *(randn(4, parts, *s, dtype=torch.float32) for s in ((6, 136), (80, 6)))
        c, residual = randn(4, 2, parts, 6, dtype=torch.float32), randn(336, parts * 80)
        norm = Norm(randn(136).detach(), randn(136).detach(), 1e-5)
        y = dual_lora(x, randn(parts * 80, 136).detach(), randn(parts * 80).detach(), A, B, c, groups, norm=norm,
                      activation=activation, residual=residual, backend="triton")
        torch.autograd.grad(y, [x, A, B, c, residual], torch.ones_like(y))
torch.cuda.synchronize()
'
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$PYTHON" -c "$operator" || [[ $? != 99 ]] || { # another code: the tool did not get that far here
            note "the rest" "not begun: no speed on a red check"
            finish 1
        }
    done
else
    note compute-sanitizer "not on the PATH"
fi

# -- fast? --------------------------------------------------------------------------------------------------

bench=("$PYTHON" -m fastdlp bench)
peft=()
if ! { has peft && has transformers; }; then
    peft=(--without-peft)
    note PEFT "not installed: no baseline"
fi
if [[ ${TUNE:-0} == 1 ]]; then
    stage tune 270 "${bench[@]}" tune --minutes 4 && cp kernels/tiles.json "$OUT/tiles-$device.json"
fi
stage "kernels, ViT-B-32" 100 "${bench[@]}" kernels --model ViT-B-32 --clients 1 --clients 10 --milliseconds 100 \
    --output "$OUT/kernels-$device-ViT-B-32.json"
for clients in 10 1; do
    stage "round, $clients clients" 150 "${bench[@]}" round --clients "$clients" --steps 2 --repeats 3 \
        --backend torch --backend triton "${peft[@]}" \
        --output "$OUT/round-$device-$clients-clients.json" --plot "$OUT/round-$device-$clients-clients.png"
done
stage "round, text" 60 "${bench[@]}" round --encoder text --clients 10 --steps 2 --repeats 3 \
    --output "$OUT/round-$device-text.json"
stage growth 120 "${bench[@]}" growth --precision bf16 --samples 8000 --batch-size 8 --clients 10 --clients 100 \
    --clients 1000 --repeats 2 --output "$OUT/growth-$device.json" --plot "$OUT/growth-$device.png"
stage "kernels, ViT-L-14" 100 "${bench[@]}" kernels --model ViT-L-14 --clients 1 --clients 10 --milliseconds 100 \
    --output "$OUT/kernels-$device-ViT-L-14.json"
finish $failed
