# Sourced by the other scripts, from the root: one Python environment, target/python, for all of them. An existing
# one is kept.
python=target/python/bin/python
[ -x "$python" ] || python3 -m venv target/python

# --no-compile: compiling a thousand modules that are never imported takes longer than the download.
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
has() { "$python" -c "import $1" 2>/dev/null; }
