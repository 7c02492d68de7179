"""CPU rows sent the way of a GPU's, to the emulated device: for a package built with the feature `emulated`."""

from contextlib import contextmanager

import torch
from ddtas import _ddtas
from ddtas.torch import operator, parts
from ddtas.torch.engine import Engine
from ddtas.torch.steps import GpuSteps

built = hasattr(_ddtas, "CudaContext") and not _ddtas.has_cuda


@contextmanager
def patched(target, **attributes):
    """Replaces attributes for a while."""
    before = {name: getattr(target, name) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def emulated_gpu(steps_from=0):
    """Sends CPU rows the way of GPU rows. With a group, batches that spare `steps_from` multiply-adds take the four steps."""

    def on_gpu(engine, rows):
        engine.gpu = engine.gpu or _ddtas.CudaContext(engine.budget, engine.allow_tf32)
        return engine.gpu, (0, 0)

    def whole_loss(*given):
        return operator._as_outputs(operator._on_gpu(operator.Call(*given)))

    with (
        patched(Engine, on_gpu=on_gpu, uses_gpu=lambda engine, rows: True),
        patched(operator, _on_cpu=operator._on_gpu, _type_of_statistics=lambda rows: torch.int64),
        patched(parts, steps_for=lambda _: GpuSteps, STEPS_FROM=steps_from, whole_loss=whole_loss),
    ):
        yield
