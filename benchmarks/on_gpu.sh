#!/usr/bin/env bash
# What wants a GPU, correctness first: benchmarks/on_gpu.sh MINUTES DIR [tests|bench|table ...]
# DIR has the parquet files of CIFAR-10. The same call goes on where the last one was stopped: tests and bench are not
# repeated once they have passed, and of the table only the runs that are missing are trained.
set -euo pipefail
usage="usage: benchmarks/on_gpu.sh MINUTES DIR [tests|bench|table ...]"
end=$((SECONDS + 60 * ${1:?$usage}))
data="$(realpath "${2:?$usage}")"
shift 2
cd "$(dirname "$0")/.."
export TORCH="${TORCH:-torch}" VENV="${VENV:-.venv}"
python="$VENV/bin/python"
passed="build/on_gpu/$(git rev-parse --short HEAD)"

left() { # seconds; none is left where it fails
    local seconds=$((end - SECONDS))
    ((seconds > 0)) && echo "$seconds"
}

once() { # NAME COMMAND ...
    local name="$1" seconds
    shift
    [[ -e "$passed/$name" ]] && return
    seconds="$(left)" || { echo "no time is left for $name; call this again" >&2; exit 124; }
    echo "$name: $*" >&2
    timeout --signal=INT --kill-after=30 "$seconds" "$@"
    mkdir -p "$passed"
    touch "$passed/$name"
}

(($#)) || set -- tests bench table
make "$VENV/dev.installed"
for part in "$@"; do
    case "$part" in
        tests)
            once tests "$python" -m pytest --device cuda tests
            once graphs "$python" -m pytest benchmarks/tests/test_paper_passes.py
            ;;
        bench) once bench make bench ;;
        table)
            seconds="$(left)" || { echo "no time is left for table; call this again" >&2; exit 124; }
            "$python" -m benchmarks.paper schedulers --scale full --data "$data" --minutes $((seconds / 60))
            ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
done
