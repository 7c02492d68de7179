"""A forked process computes what its parent computes, with its own workspace and threads."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

import ddtas
import numpy as np
import pytest
from formula import unit_rows

# Python 3.12 and newer warn of forks of processes with threads, which these tests check.
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

SECONDS = 30


def batch(count=600, dim=64):
    """A batch large enough for every pass to be split among threads."""
    rows, labels = unit_rows(count, dim, seed=7, classes=40)
    return rows.astype(np.float32), labels


def every_entry(context):
    rows, labels = batch()
    references, reference_labels = batch(300)
    output = ddtas.loss(rows, labels, context=context)
    against = ddtas.loss(rows, labels, references, reference_labels, reference_gradient=True, context=context)
    sums = ddtas.threshold_gradient(rows, labels, rows[::-1].copy(), context=context)
    recall = ddtas.recall_at_k(rows, labels, context=context)
    double = ddtas.loss(rows[:50].astype(float), labels[:50], context=context).loss
    gradients = output.gradient.tobytes(), against.reference_gradient.tobytes()
    return output.loss, against.loss, gradients, sums, dict(recall), double


def in_a_child(work):
    """Runs `work` in a forked child, which must succeed before its alarm."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"the child hung, or died of signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_every_entry_works_in_a_child_whose_parent_has_used_it(threads):
    context = None if threads is None else ddtas.Context(threads)
    want = every_entry(context)

    def work():
        assert every_entry(context) == want
        assert every_entry(ddtas.Context(2)) == want
        assert every_entry(None) == want
        # The same in a child of the child.
        in_a_child(lambda: every_entry(context) == want or os._exit(1))

    in_a_child(work)
    assert every_entry(context) == want, "the parent goes on"


def test_a_context_that_another_thread_uses_at_the_fork_works_in_the_child():
    context, stop = ddtas.Context(2), threading.Event()
    rows, labels = batch(2000, 256)
    small = batch()
    want = ddtas.loss(*small, context=context).loss

    def keep_it_locked():
        while not stop.is_set():
            ddtas.loss(rows, labels, context=context)

    thread = threading.Thread(target=keep_it_locked)
    thread.start()
    try:
        for _ in range(5):
            time.sleep(0.01)
            in_a_child(lambda: ddtas.loss(*small, context=context).loss == want or os._exit(1))
    finally:
        stop.set()
        thread.join()


def test_a_child_drops_a_context_of_its_parent():
    context = ddtas.Context(2)
    ddtas.loss(*batch(), context=context)

    def work():
        nonlocal context
        context = None

    in_a_child(work)
    ddtas.loss(*batch(), context=context)


def loss_of(seed):
    rows, labels = unit_rows(300, 64, seed=seed, classes=40)
    return ddtas.loss(rows.astype(np.float32), labels).loss


def test_a_pool_of_forked_processes_computes():
    want = [loss_of(seed) for seed in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(loss_of, range(6)).get(timeout=SECONDS) == want


def test_the_worker_of_a_data_loader_computes():
    pytest.importorskip("torch", reason="torch is not installed: its tests do not run")
    # In a fresh process: torch refuses to differentiate in a fork once its threads for that have started.
    subprocess.run([sys.executable, __file__], check=True, timeout=2 * SECONDS)


def compute_in_a_data_loader():
    import torch
    from ddtas.torch import SoftContrastiveLoss, recall_at_k

    loss = SoftContrastiveLoss(threads=2)
    rows, labels = (torch.from_numpy(array) for array in batch())

    class Mined(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            embeddings = rows.clone().requires_grad_()
            value = loss(embeddings, labels)
            value.backward()
            return value.item(), embeddings.grad.abs().sum().item(), recall_at_k(rows, labels)[1]

    here = Mined()[0]
    assert here[0] > 0
    loader = torch.utils.data.DataLoader(
        Mined(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    assert [there[0] for there in loader] == [here[0]] * 3
    for there in loader:
        assert there == pytest.approx(here, rel=1e-6)


if __name__ == "__main__":
    compute_in_a_data_loader()
