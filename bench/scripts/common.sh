# Shared by the benchmarks in this folder, which source it with their arguments.
#
# Goes to the root of the repository. Takes --commit out of the arguments; the others are in the
# array `args`. Sets `records`, the folder for new records: target/bench, or with --commit a
# temporary folder whose records `keep_records` then commits (records.py).

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
args=() commit=
for arg in "$@"; do
    if [ "$arg" = --commit ]; then commit=yes; else args+=("$arg"); fi
done
records=target/bench
mkdir -p "$records"
[ -z "$commit" ] || records=$(mktemp -d "$records/commit.XXXXXX")

# Ends the script unless all these programs are installed.
need() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 1; }
    done
}

keep_records() {
    [ -z "$commit" ] || bench/scripts/records.py keep "$records"/*.json
}
