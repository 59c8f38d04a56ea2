#!/bin/sh
# All benchmarks: scripts/bench_all.sh FOLDER [OPTIONS], e.g. `results --device cuda`.
# Writes FOLDER/<name>.json and the profile of a step; PYTHON chooses the interpreter.
# Goes on after one that fails, and then ends with 1.
set -u
folder=$1
shift
here=$(dirname "$0")
mkdir -p "$folder" || exit 1
points=32 draws=1048576 rounds=15
for option in "$@"; do
    if [ "$option" = --quick ]; then points=2 draws=1024 rounds=2; fi
done
failed=

# bench NAME OPTIONS: one script, and how long it took.
bench() {
    name=$1
    shift
    started=$(date +%s)
    "${PYTHON:-python}" "$here/bench_$name.py" "$@" || failed="$failed $name"
    echo "$name: $(($(date +%s) - started)) s" >&2
}

bench step --json "$folder/step.json" --profile "$folder/profile.txt" "$@"
for name in fleet scaling sampler neighbours histograms; do
    bench "$name" --json "$folder/$name.json" "$@"
done
bench noise --json "$folder/noise.json" --draws "$draws" --rounds "$rounds"
bench calibration --json --points "$points" >"$folder/calibration.json"
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
