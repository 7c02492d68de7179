# Sourced by the other scripts, from the root: one Python environment, target/python, for all of them. An existing
# one is kept.
python=target/python/bin/python
[ -x "$python" ] || python3 -m venv target/python

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
