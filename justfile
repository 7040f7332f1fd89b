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
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p afterimage-cache -p afterimage-memo --lib

# Seeded histories of faults on virtual time for so many seconds; SIMULATION_SEED=n repeats one
simulate SECONDS="60":
    SIMULATION_SECONDS={{SECONDS}} cargo test --release -p afterimage-memo --lib -- --nocapture simulation:: forgeries::

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

# Hits per second: the memo on one core, the load on the other
bench-memo *ARGS:
    bench/scripts/memo.sh {{ARGS}}

# The classifier's speed, and the same models in LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime
bench-classifier DIR *ARGS:
    bench/scripts/classifier.sh {{DIR}} {{ARGS}}

# The memo's stores side by side, the cache service with more threads, reads during a snapshot
bench-scaling *ARGS:
    bench/scripts/stores.py {{ARGS}}
    bench/scripts/scaling.py {{ARGS}}
    bench/scripts/snapshot.py {{ARGS}}

# The overhead of a memo that only misses, beside its classifier asked directly
bench-overhead *ARGS:
    bench/scripts/overhead.sh {{ARGS}}

# A memo at ten times its capacity for a minute: its memory, and its hits meanwhile
bench-overload *ARGS:
    bench/scripts/overload.sh {{ARGS}}

# The cache service beside Redis and memcached, each on one core, the load on the other
bench-cache *ARGS:
    bench/scripts/cache.sh {{ARGS}}

# The memo against the classifier, and beside gRPC and FastAPI + scikit-learn + Redis
bench-memo-peers *ARGS:
    bench/scripts/memo-peers.sh {{ARGS}}

# Format and clippy of the peers of bench-memo-peers, a workspace of its own
peers-check:
    cargo fmt --manifest-path bench/peers/Cargo.toml --check
    cargo clippy --manifest-path bench/peers/Cargo.toml --all-targets --locked -- -D warnings

# The wire codec alone: frames per second
bench-codec *ARGS:
    bench/scripts/codec.sh {{ARGS}}

# The load generator alone, against a server that only answers
bench-generator *ARGS:
    bench/scripts/generator.sh {{ARGS}}

# Micro-benchmarks: codec, key, flights, table, feature map, scoring; one alone: cargo bench -p CRATE --bench NAME
bench-micro *ARGS:
    bench/scripts/micro.py {{ARGS}}

# Measures and commits all records; DIR holds the four MNIST files. Half an hour on a quiet machine
bench-all DIR="": (bench-codec "--commit") (bench-micro "--commit") (bench-generator "--commit") (bench-memo "--commit") (bench-memo-peers "--commit") (bench-overhead "--commit") (bench-overload "--commit") (bench-cache "--commit")
    @[ -n "{{DIR}}" ] || echo "SKIPPED: the classifier's records; just bench-all DIR, with MNIST's files in it"
    [ -z "{{DIR}}" ] || bench/scripts/classifier.sh --commit "{{DIR}}"
    [ -z "{{DIR}}" ] || bench/scripts/kernel-svm.sh --commit "{{DIR}}"

# Write docs/performance.md and the figures of the READMEs from bench/records
performance:
    bench/scripts/performance.py

# An RBF model of LIBSVM beside svm-predict, both on one core; DIR holds the four MNIST files
bench-kernel-svm DIR *ARGS:
    bench/scripts/kernel-svm.sh {{DIR}} {{ARGS}}
