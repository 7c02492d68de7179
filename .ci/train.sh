# Sourced by the other scripts: sets DDTAS_TRAIN, the training program, unless .ci/run has set it to the one that the tests
# have built. (A build without the tests' dependencies has other features, and compiles the engine again.)
if [[ -z ${DDTAS_TRAIN:-} ]]; then
    cargo build --release --quiet --bin ddtas-train
    DDTAS_TRAIN=$PWD/target/release/ddtas-train
fi
