"""A context's workspace and threads: any number of threads gives the same bits, and calls release the interpreter's lock."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import ddtas
import numpy as np
import pytest
from ddtas.functional import context_of
from formula import unit_rows


def batch(count, dim=32, seed=0):
    rows, labels = unit_rows(count, dim, seed, classes=40)
    return rows.astype(np.float32), labels


def test_the_number_of_threads_does_not_change_a_bit():
    rows, labels = batch(700)
    outputs = [ddtas.loss(rows, labels, context=ddtas.Context(threads)) for threads in (1, 2, 3, None)]
    for output in outputs[1:]:
        assert output.loss == outputs[0].loss
        np.testing.assert_array_equal(output.gradient, outputs[0].gradient)


def test_threads_are_as_many_as_asked_for():
    assert ddtas.Context(3).threads == 3
    assert ddtas.Context().threads >= 1
    for count in (-1, 0, 1025, 100_000, 2**63):
        with pytest.raises(ValueError, match=f"threads = {count} is out of range: 1 to 1024"):
            ddtas.Context(count)
    for bad in (1.5, "two"):
        with pytest.raises(TypeError, match=f"threads = {bad!r} must be an integer"):
            ddtas.Context(bad)


def default_threads(environment):
    """Threads of the process's pool with these variables, in a fresh process: its own, and a forked child's."""
    program = """
import os, ddtas
assert os.environ.get("USED") is None or ddtas.Context().threads
child = os.fork()
os.write(1, b"%d\\n" % ddtas.Context().threads)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    plain = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], env=plain | environment, capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


def test_the_process_s_pool_has_as_many_threads_as_torch_and_numpy():
    cores = default_threads({})
    assert len(cores) == 2 and cores[0] == cores[1] >= 1
    for given, count in [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,4"}, 1),
        ({"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "100000"}, cores[0]),
        ({"OMP_NUM_THREADS": "none"}, cores[0]),
    ]:
        for used in ({}, {"USED": "1"}):
            assert default_threads(given | used) == [count] * 2, (given, used)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not list threads")
def test_the_threads_of_a_context_end_with_it():
    def is_ours(task):
        try:
            return (task / "comm").read_text().startswith("ddtas-")
        except OSError:  # the thread has ended since it was listed
            return False

    def ours():
        return sum(map(is_ours, Path("/proc/self/task").iterdir()))

    def becomes(count):
        # A thread takes its name after it was started, and may be listed for a moment after it was joined.
        return any(ours() == count or time.sleep(0.01) for _ in range(500))

    before = ours()
    context = ddtas.Context(7)
    ddtas.loss(*batch(300), context=context)
    assert becomes(before + 7)
    del context
    assert becomes(before)


def test_the_workspace_is_kept_from_call_to_call():
    # One thread: of several, chance decides which get work and so need buffers.
    context = ddtas.Context(1)
    rows, labels = batch(300)
    ddtas.loss(rows, labels, context=context)
    held = context.workspace_bytes
    assert held > 0
    for _ in range(3):
        ddtas.loss(rows, labels, context=context)
    assert context.workspace_bytes == held


def test_a_copy_and_a_pickle_are_contexts_with_as_many_threads():
    context = ddtas.Context(2)
    rows, labels = batch(50)
    want = ddtas.loss(rows, labels, context=context).loss
    for again in (copy.copy(context), copy.deepcopy(context), pickle.loads(pickle.dumps(context))):
        assert again.threads == 2
        assert ddtas.loss(rows, labels, context=again).loss == want
    assert ddtas.Settings() == pickle.loads(pickle.dumps(ddtas.Settings()))


def test_python_runs_on_while_the_loss_is_computed():
    rows, labels = batch(4000, dim=256)
    started, done, ticks = threading.Event(), threading.Event(), 0

    def tick():
        nonlocal ticks
        started.set()
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    before, begin = ticks, time.perf_counter()
    ddtas.loss(rows, labels, context=ddtas.Context(1))
    during, elapsed = ticks - before, time.perf_counter() - begin
    done.set()
    thread.join()
    # With the interpreter's lock held there would be at most one tick.
    assert during >= 3, f"{during} ticks in {elapsed:.3f} s"


def test_one_context_serves_many_threads():
    batches = [batch(90 + i, seed=i) for i in range(6)]
    want = [ddtas.loss(*given).loss for given in batches]
    context, wrong = ddtas.Context(2), []

    def work(i):
        for _ in range(20):
            if ddtas.loss(*batches[i], context=context).loss != want[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_thread_has_a_context_of_its_own():
    found = [context_of(None), context_of(None)]
    thread = threading.Thread(target=lambda: found.append(context_of(None)))
    thread.start()
    thread.join()
    assert found[0] is found[1] and found[0] is not found[2]


def test_an_error_leaves_the_context_in_order():
    context = ddtas.Context()
    rows, labels = batch(64)
    want = ddtas.loss(rows, labels, context=context).loss
    bad = rows.copy()
    bad[60] = np.nan
    with pytest.raises(ValueError, match="row 60"):
        ddtas.loss(bad, labels, context=context)
    assert ddtas.loss(rows, labels, context=context).loss == want
