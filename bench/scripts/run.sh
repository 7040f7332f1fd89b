#!/usr/bin/env bash
# Runs a measurement, prints its figures and writes its records into target/bench. With --commit the
# records replace those in bench/records, and the documents are generated again.
#
#     bench/scripts/run.sh [--commit] NAME [ARGUMENTS]
#
#   memo [SECONDS per depth, default 5]  hits over TCP: plain, with busy polling, over TLS
#   memo-peers                           the memo beside its classifier, gRPC and FastAPI (4 min)
#   overhead                             a memo that only misses, beside its classifier (3 min)
#   overload [SECONDS, default 60]       a memo under ten times its capacity
#   bytes                                stored answers of 4 KiB, and inputs of 1 MiB (1 min)
#   cache                                the cache service beside Redis and memcached (5 min)
#   classifier [MNIST_DIR]               the classifier beside LIBLINEAR, LIBSVM, scikit-learn and
#                                        ONNX Runtime (4 min; MNIST_DIR is data/mnist by default)
#   kernel-svm MNIST_DIR [MODEL]         a kernel machine beside LIBSVM's svm-predict
#   codec                                frames that are encoded and decoded
#   generator                            the load generator against a server that only replies
#
# Servers run on the first core and the load on the second.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

args=() commit=
for arg in "$@"; do
    if [ "$arg" = --commit ]; then commit=yes; else args+=("$arg"); fi
done
name=${args[0]:-}
args=("${args[@]:1}")
records=target/bench
mkdir -p "$records"
[ -z "$commit" ] || records=$(mktemp -d "$records/commit.XXXXXX")
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; wait; rm -rf "$folder"' EXIT

# Ends the script unless all these programs are installed.
need() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 1; }
    done
}

build() { cargo build --release --locked "$@"; }

# hits RECORD_NAME SERVER_FLAGS CLIENT_FLAGS; the flags may not contain other spaces.
hits() {
    : >"$folder/log"
    taskset -c 0 target/release/afterimage serve --listen 127.0.0.1:0 --threads 1 --compute-threads 1 $2 >"$folder/log" &
    server=$!
    until address=$(sed -n 's/^memo listening on //p' "$folder/log") && [ -n "$address" ]; do sleep 0.05; done
    target/release/afterimage bench "$address" $3 --pin 1 --prefill --population 10000 \
        --depth 1,64,256,1024,4096 --duration "${args[0]:-5}s" \
        --record "$records" --record-name "$1"
    kill "$server"
    wait "$server" || true
    server=
}

case $name in
memo)
    need openssl taskset
    build
    hits memo-hot "" ""
    hits memo-hot-busy-poll "--busy-poll 1ms" ""
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$folder/key" -out "$folder/cert" -days 2 \
        -subj /CN=bench -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE 2>"$folder/log"
    hits memo-hot-tls "--tls-cert $folder/cert --tls-key $folder/key" "--tls --tls-ca $folder/cert"
    ;;
memo-peers)
    need redis-server taskset python3
    build
    build -p afterimage-bench --bin memo_peers --bin null_server
    build --manifest-path bench/peers/Cargo.toml
    # PEERS_VENV names a folder that keeps the Python packages for the next run.
    venv=${PEERS_VENV:-$folder/venv}
    bench/peers/fastapi/run.sh "$venv"
    target/release/memo_peers target/release/afterimage "$records" \
        bench/peers/target/release "$venv/bin/python" target/release/null_server
    ;;
overhead | overload)
    need taskset
    build
    build -p afterimage-bench --bin memo_cost
    seconds=()
    [ "$name" = overhead ] || seconds=("${args[0]:-60}")
    target/release/memo_cost "$name" target/release/afterimage "$records" "${seconds[@]}"
    ;;
bytes)
    cargo bench --locked -p afterimage-bench --bench byte_answers -- "$PWD/$records"
    ;;
cache)
    need redis-server memcached taskset
    build
    build -p afterimage-bench --bin cache_peers
    cargo bench --locked -p afterimage-cache --bench hit_ratio >"$folder/ratios"
    target/release/cache_peers target/release/afterimage "$records" "$folder/ratios"
    ;;
classifier)
    # Debian has these tools in liblinear-tools and libsvm-tools.
    need python3 cc taskset liblinear-predict svm-predict
    data=data/mnist
    [ ${#args[@]} = 0 ] || data=$(cd "$here" && realpath "${args[0]}")
    [ -e "$data/train-images-idx3-ubyte" ] || [ -e "$data/train-images-idx3-ubyte.gz" ] ||
        { echo "$data has no train-images-idx3-ubyte" >&2; exit 1; }
    build -p afterimage-classifier-tools --bins
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --requirement bench/peers/requirements.txt
    cc -O3 -march=native -o "$folder/in_process" bench/peers/in_process.c -l:liblinear.so.4 -l:libsvm.so.3
    # A BLAS with several threads would use more than one core.
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
    "$folder/venv/bin/python" bench/peers/classifier.py "$data" "$folder" "$records"
    ;;
kernel-svm)
    # Without MODEL it trains one of more than 9,000 support vectors. These are MNIST images, so the
    # model is deleted afterwards.
    [ ${#args[@]} -gt 0 ] || { echo "usage: bench/scripts/run.sh [--commit] kernel-svm MNIST_DIR [MODEL]" >&2; exit 2; }
    paths=()
    for path in "${args[@]}"; do paths+=("$(cd "$here" && realpath "$path")"); done
    need svm-train svm-predict taskset
    build --example kernel_svm
    taskset -c 1 target/release/examples/kernel_svm "${paths[0]}" "$records" "${paths[@]:1}"
    ;;
codec)
    build -p afterimage-bench --bin codec
    target/release/codec "$records"
    ;;
generator)
    build -p afterimage-bench --bin null_server
    target/release/null_server all "$records"
    ;;
*)
    sed -n '2,/^# Servers/ s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
[ -z "$commit" ] || bench/scripts/records.py keep "$records"/*.json
