# Sourced by the scripts beside it, from the root: one Python environment, target/python, for all of them. What is there
# already is kept.
python=target/python/bin/python
[ -x "$python" ] || python3 -m venv target/python

# Compiling a thousand modules that are never imported takes longer than the download.
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
has() { "$python" -c "import $1" 2>/dev/null; }
