# Sourced by the other scripts, from the root: one Python environment, target/python, for all of them, and others for single checks.

# Makes target/$1 the environment that the functions below use. An existing one is kept.
use_environment() {
    python=target/$1/bin/python
    [ -x "$python" ] || python3 -m venv "target/$1"
}
use_environment python

# The versions that are tested: a new one of mypy or NumPy may report what this one does not.
export PIP_CONSTRAINT=$PWD/.ci/constraints.txt
# --no-compile: compiling a thousand modules that are never imported takes longer than the download. pip gives up a download that is
# cut off, so each is tried three times.
install() {
    for try in 1 2 3; do
        "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@" && return
        echo "pip install $*: failed, try $try"
        sleep "$try"
    done
    return 1
}
has() { "$python" -c "import $1" 2>/dev/null; }

# The oldest torch that the Python package promises to work with, in an environment of its own.
oldest_torch=2.11.0
oldest_torch() {
    use_environment python-oldest-torch
    has torch || "$python" .ci/torch_cpu.py "$oldest_torch"
}

# Builds the Python package's wheel into the folder $1 as `pip install .` does from a clean clone, with pip's settings $2 and so on.
wheel() {
    rm -rf "$1"
    CARGO_TARGET_DIR=$PWD/target/python-build \
        "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$1" . "${@:2}"
}

# Installs the wheel in the folder $1 in a new environment, target/$2, of the oldest Python at hand, with the newest NumPy for it.
fresh() {
    local oldest
    for oldest in python3.10 ~/.pyenv/versions/3.10.*/bin/python3.10 python3.11 python3; do
        "$oldest" -c "" 2>/dev/null && break
    done
    "$oldest" -m venv --clear --without-pip "target/$2"
    PIP_CONSTRAINT= "$python" -m pip --python "target/$2/bin/python" install --quiet --disable-pip-version-check "$1"/*.whl
}
