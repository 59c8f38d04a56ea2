#!/bin/sh
# One part of the default model changed at a time, on Adult. usage: ablations.sh FOLDER OUT EPSILON FIRST END
set -eu
run() {
    python "$(dirname "$0")/protocol.py" "$1" "$2" --tables adult --epsilons "$3" --seeds "$4" "$5" \
        --models "$6" --recipe "$7"
}
shares() {
    echo "{\"privacy\": {\"shares\": {\"codec\": $1, \"marginals\": $2, \"tables\": $3}}}"
}
option() { echo "{\"options\": {$1}}"; }

all="$1 $2 $3 $4 $5"
# Defaults (codec .20, label tables .19, chosen tables .56); then how the budget is divided: DP-SGD
# has what is left, but for 1 % that the number of rows costs.
run $all autoregressive '{}'
run $all autoregressive "$(shares 0.2 0.19 0.46)"
run $all autoregressive "$(shares 0.2 0.19 0.31)"
run $all autoregressive "$(shares 0.2 0.19 0.11)"
run $all autoregressive '{"options": {"components": 0}, "privacy": {"shares": {"codec": 0.2, "marginals": 0.19, "tables": 0.0}}}'
run $all autoregressive '{"options": {"components": 0}, "privacy": {"shares": {"codec": 0.2, "marginals": 0.01, "tables": 0.0}}}'
run $all autoregressive "$(shares 0.2 0.05 0.7)"
run $all autoregressive "$(shares 0.2 0.35 0.4)"
run $all autoregressive "$(shares 0.05 0.19 0.71)"
# Bins and heaps.
run $all autoregressive '{"codec": {"bins": 12}}'
run $all autoregressive '{"codec": {"bins": 32}}'
run $all autoregressive '{"codec": {"heaps": 0}}'
# The model: components, average, clipping, batch.
run $all autoregressive "$(option '"components": 128')"
run $all autoregressive "$(option '"average": 0.1')"
run $all autoregressive "$(option '"average": 0.999')"
run $all autoregressive '{"privacy": {"clip": 1.0}}'
run $all autoregressive '{"privacy": {"clip": 10.0}}'
run $all autoregressive '{"privacy": {"batch": 512}}'
# Samples as they are drawn.
run $all autoregressive "$(option '"reconcile": false')"
# K masks a record, for the family that has them.
run $all diffusion '{}'
run $all diffusion "$(option '"draws": 1')"
run $all diffusion "$(option '"draws": 16')"
