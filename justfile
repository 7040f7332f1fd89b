# Everyday commands. `just` lists them; `just ci` runs the same checks as CI.

# List the commands
default:
    @just --list

# Run the same checks as CI
ci:
    .ci/run

# Show misses and hits of the whole system on loopback
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

# Run all tests, doc tests included
test:
    cargo test --workspace

# Format, and run clippy
lint:
    cargo fmt --all
    cargo clippy --workspace --all-targets -- -D warnings

# Open the documentation of every crate in a browser
doc:
    cargo doc --workspace --no-deps --open

# Check licences, duplicates and sources of the dependencies
deny:
    cargo deny check bans licenses sources

# Model-check every interleaving: readers and writers of one bucket, waiters of one flight
loom:
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p afterimage-cache -p afterimage-memo --lib --test flights_model

# Simulate random fault histories on virtual time; SIMULATION_SEED=n repeats one
simulate SECONDS="60":
    SIMULATION_SECONDS={{SECONDS}} cargo test --release -p afterimage-memo --test simulation --test forgeries -- --nocapture

# Kill, stop and drain real processes under load
chaos SECONDS="60":
    CHAOS_SECONDS={{SECONDS}} cargo test --release --test chaos -- --nocapture

# Run the label table under Miri (some minutes)
miri:
    CARGO_TARGET_DIR=target/miri MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p afterimage-cache --lib --test table

# Fuzz one target, or each of them, for SECONDS
fuzz TARGET="" SECONDS="20":
    fuzz/run {{SECONDS}} {{TARGET}}

# Train the raw-pixel model again; DIR holds the four MNIST files
train DIR:
    cargo run --release -- train --features raw --seed 1 --data {{DIR}} --out classifier/models/raw-linear.safetensors

# Measure hits: the memo on one core, the load on the other. --commit keeps the record
bench-memo *ARGS:
    bench/scripts/run.sh memo {{ARGS}}

# Measure the classifier beside LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime
bench-classifier DIR *ARGS:
    bench/scripts/run.sh classifier {{DIR}} {{ARGS}}

# Measure the stores, the cache service with more threads, and readers during a snapshot
bench-scaling *ARGS:
    bench/scripts/stores.py {{ARGS}}
    bench/scripts/scaling.py {{ARGS}}
    bench/scripts/snapshot.py {{ARGS}}

# Measure the overhead of a memo without hits, beside its classifier alone
bench-overhead *ARGS:
    bench/scripts/run.sh overhead {{ARGS}}

# Measure a memo under ten times its capacity for a minute: memory, and hits
bench-overload *ARGS:
    bench/scripts/run.sh overload {{ARGS}}

# Measure the cache service beside Redis and memcached, each on one core
bench-cache *ARGS:
    bench/scripts/run.sh cache {{ARGS}}

# Measure the memo beside the classifier alone, gRPC, and FastAPI + scikit-learn + Redis
bench-memo-peers *ARGS:
    bench/scripts/run.sh memo-peers {{ARGS}}

# Run clippy on the peers of bench-memo-peers, a workspace of their own
peers-check:
    cargo fmt --manifest-path bench/peers/Cargo.toml --check
    cargo clippy --manifest-path bench/peers/Cargo.toml --all-targets --locked -- -D warnings

# Measure the codec alone: frames per second
bench-codec *ARGS:
    bench/scripts/run.sh codec {{ARGS}}

# Measure the load generator alone, against a server that only replies
bench-generator *ARGS:
    bench/scripts/run.sh generator {{ARGS}}

# Run the micro-benchmarks; one alone: cargo bench -p CRATE --bench NAME
bench-micro *ARGS:
    bench/scripts/micro.py {{ARGS}}

# Measure and commit all records (half an hour on a quiet machine); DIR holds the four MNIST files
bench-all DIR="": (bench-codec "--commit") (bench-micro "--commit") (bench-generator "--commit") (bench-memo "--commit") (bench-memo-peers "--commit") (bench-overhead "--commit") (bench-overload "--commit") (bench-cache "--commit")
    @[ -n "{{DIR}}" ] || echo "SKIPPED: the classifier's records. Run them with: just bench-all DIR (the folder of the MNIST files)"
    [ -z "{{DIR}}" ] || bench/scripts/run.sh classifier --commit "{{DIR}}"
    [ -z "{{DIR}}" ] || bench/scripts/run.sh kernel-svm --commit "{{DIR}}"

# Generate docs/performance.md and the figures of the READMEs from bench/records
performance:
    bench/scripts/performance.py

# Measure an RBF model beside LIBSVM's svm-predict; DIR holds the four MNIST files
bench-kernel-svm DIR *ARGS:
    bench/scripts/run.sh kernel-svm {{DIR}} {{ARGS}}
