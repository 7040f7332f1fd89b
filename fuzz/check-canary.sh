#!/usr/bin/env bash
# Fails unless the fuzzer finds the bug planted in the canary within a minute. Without this check
# a broken harness (no instrumentation, findings not reported) looks like success.
set -uo pipefail
cd "$(dirname "$0")"

if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "SKIPPED the canary: install a nightly toolchain and cargo-fuzz to run it"
    exit 0
fi
cargo +nightly fuzz build || exit 1
# As `cargo fuzz run` does. SQLite has constants of one name in two of its parts.
export ASAN_OPTIONS="detect_odr_violation=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
program=target/$(rustc +nightly -vV | sed -n 's/^host: //p')/release/fuzz

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
started=$SECONDS
FUZZ_TARGET=canary "$program" -max_total_time=60 -max_len=64 -artifact_prefix="$folder/" >"$folder/log" 2>&1
status=$?
if [ $status -eq 0 ] || ! grep -aq 'the fuzzer found the planted bug' "$folder/log"; then
    echo "the planted bug was NOT found (exit status $status): do not trust the results of the fuzz targets"
    tail -20 "$folder/log"
    exit 1
fi
executions=$(grep -aoE '^#[0-9]+' "$folder/log" | tail -1)
echo "the planted bug was found in $((SECONDS - started)) s, after about ${executions#\#} executions"
