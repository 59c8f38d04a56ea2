#!/bin/sh
# All benchmarks: scripts/bench_all.sh FOLDER [OPTIONS], e.g. `results --device cuda`.
# Writes FOLDER/<name>.json and the profile of a step; PYTHON chooses the interpreter.
set -eu
folder=$1
shift
here=$(dirname "$0")
mkdir -p "$folder"
"${PYTHON:-python}" "$here/bench_step.py" --json "$folder/step.json" --profile "$folder/profile.txt" "$@"
for name in fleet sampler scaling neighbours; do
    "${PYTHON:-python}" "$here/bench_$name.py" --json "$folder/$name.json" "$@"
done
