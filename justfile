# `just` lists what there is to do; `just ci` is what CI runs.

# What there is to do
default:
    @just --list

# All that CI runs, as CI runs it
ci:
    .ci/run

# The whole system on loopback, cold then hot
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

# All tests, doc tests included
test:
    cargo test --workspace

# Format, and see what clippy says
lint:
    cargo fmt --all
    cargo clippy --workspace --all-targets -- -D warnings

# The documentation of every room, in a browser
doc:
    cargo doc --workspace --no-deps --open

# Licences, duplicates and sources of what we depend on
deny:
    cargo deny check bans licenses sources

# Two memory models: every interleaving of readers and writers in one bucket, and of callers on one flight
loom:
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p afterimage-cache -p afterimage-memo --lib --test flights_model

# Seeded histories of faults on virtual time for so many seconds; SIMULATION_SEED=n repeats one
simulate SECONDS="60":
    SIMULATION_SECONDS={{SECONDS}} cargo test --release -p afterimage-memo --test simulation --test forgeries -- --nocapture

# Real processes killed, stopped and drained under load for so many seconds
chaos SECONDS="60":
    CHAOS_SECONDS={{SECONDS}} cargo test --release --test chaos -- --nocapture

# The table under Miri, some minutes
miri:
    CARGO_TARGET_DIR=target/miri MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p afterimage-cache --lib --test table

# One fuzz target, or every one, for so many seconds
fuzz TARGET="" SECONDS="20":
    fuzz/run {{SECONDS}} {{TARGET}}

# Train the raw-pixel model anew; DIR holds the four MNIST files
train DIR:
    cargo run --release -- train --features raw --seed 1 --data {{DIR}} --out classifier/models/raw-linear.safetensors

# Remembered answers a second: the memo on one core, the load on the other
bench-memo:
    bench/memo

# The classifier's speed, and the same models in LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime
bench-classifier DIR:
    bench/classifier {{DIR}}

# The memo's stores side by side, what more threads give the cache, what a snapshot costs its readers
bench-scaling *ARGS:
    bench/stores {{ARGS}}
    bench/scaling {{ARGS}}
    bench/snapshot {{ARGS}}

# What a memo costs that remembers nothing, beside its classifier asked directly
bench-overhead:
    bench/overhead

# A memo asked for ten times what it can do, for a minute: its memory, and its hits meanwhile
bench-overload:
    bench/overload

# The cache beside Redis and memcached, each on one core, the load on the other
bench-cache:
    bench/cache

# The memo against the classifier, and beside gRPC and FastAPI + scikit-learn + Redis
bench-memo-peers:
    bench/memo-peers

# That the peers of bench-memo-peers compile, and what clippy says of them: a workspace of its own
peers-check:
    cargo fmt --manifest-path bench/peers/Cargo.toml --check
    cargo clippy --manifest-path bench/peers/Cargo.toml --all-targets --locked -- -D warnings

# The wire codec alone: frames a second
bench-codec:
    bench/codec

# The load generator alone, against a server that only answers
bench-generator:
    bench/generator

# Micro-benchmarks: codec, key, flights, table, feature map, scoring; one alone: cargo bench -p CRATE --bench NAME
bench-micro *ARGS:
    bench/micro {{ARGS}}

# All records anew, and all that is made from them; DIR holds the four MNIST files. Half an hour on a quiet machine
bench-all DIR="": bench-codec bench-micro bench-generator bench-memo bench-memo-peers bench-overhead bench-overload bench-cache
    @[ -n "{{DIR}}" ] || echo "SKIPPED: the classifier's records; just bench-all DIR, with MNIST's files in it"
    [ -z "{{DIR}}" ] || bench/classifier "{{DIR}}"
    [ -z "{{DIR}}" ] || bench/kernel-svm "{{DIR}}"
    cargo run -p afterimage-bench --example performance

# docs/performance.md and the READMEs' figures from the newest records
performance:
    cargo run -p afterimage-bench --example performance

# An RBF model of LIBSVM's beside svm-predict, both on one core; DIR holds the four MNIST files
bench-kernel-svm DIR:
    bench/kernel-svm {{DIR}}
