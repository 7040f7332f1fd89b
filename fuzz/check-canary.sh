#!/usr/bin/env bash
# Fails unless the fuzzer finds, within a minute, the bug that is planted in the canary. A harness that is
# broken (no instrumentation, findings not reported) finds nothing anywhere, and that looks like success.
set -uo pipefail
cd "$(dirname "$0")"

if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "SKIPPED the canary: there is no nightly toolchain, or no cargo-fuzz"
    exit 0
fi
cargo +nightly fuzz build canary || exit 1
program=target/$(rustc +nightly -vV | sed -n 's/^host: //p')/release/canary

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
started=$SECONDS
"$program" -max_total_time=60 -max_len=64 -artifact_prefix="$folder/" >"$folder/log" 2>&1
status=$?
if [ $status -eq 0 ] || ! grep -aq 'the canary sings' "$folder/log"; then
    echo "the planted bug was NOT found (exit status $status): what the fuzzer reports cannot be trusted"
    tail -20 "$folder/log"
    exit 1
fi
executions=$(grep -aoE '^#[0-9]+' "$folder/log" | tail -1)
echo "the planted bug was found in $((SECONDS - started)) s, after ${executions#\#} executions or a few more"
