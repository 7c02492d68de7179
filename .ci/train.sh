# Sourced by the scripts beside it: DDTAS_TRAIN is the training program, as the tests have built it where .ci/run says
# so, else built now. (A build without the tests' dependencies has other features, and compiles the engine anew.)
if [[ -z ${DDTAS_TRAIN:-} ]]; then
    cargo build --release --quiet --bin ddtas-train
    DDTAS_TRAIN=$PWD/target/release/ddtas-train
fi
