#!/usr/bin/env bash
# Measures hits per second over TCP: `afterimage serve` on the first core, the load on the second;
# then the same over TLS and with busy polling. Writes the records "memo-hot", "memo-hot-busy-poll"
# and "memo-hot-tls". Usage: bench/scripts/memo.sh [--commit] [SECONDS per depth, default 5]
set -euo pipefail
. "$(dirname "$0")/common.sh"
seconds=${args[0]:-5}

need openssl taskset
cargo build --release --locked
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; wait; rm -rf "$folder"' EXIT

# measure RECORD-NAME SERVER-FLAGS CLIENT-FLAGS; the flags may not contain other spaces.
measure() {
    : >"$folder/log"
    taskset -c 0 target/release/afterimage serve --listen 127.0.0.1:0 --threads 1 --compute-threads 1 $2 >"$folder/log" &
    server=$!
    until address=$(sed -n 's/^memo listening on //p' "$folder/log") && [ -n "$address" ]; do sleep 0.05; done
    target/release/afterimage bench "$address" $3 --pin 1 --prefill --population 10000 \
        --depth 1,64,256,1024,4096 --duration "${seconds}s" \
        --record "$records" --record-name "$1"
    kill "$server"
    wait "$server" || true
    server=
}

measure memo-hot "" ""
measure memo-hot-busy-poll "--busy-poll 1ms" ""
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$folder/key" -out "$folder/cert" -days 2 \
    -subj /CN=bench -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE 2>"$folder/log"
measure memo-hot-tls "--tls-cert $folder/cert --tls-key $folder/key" "--tls --tls-ca $folder/cert"
keep_records
