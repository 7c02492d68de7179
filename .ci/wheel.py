"""What a wheel of the Python package computes on the CPU, to the last bit, and how one with CUDA refuses without a GPU.

    python .ci/wheel.py cpu|cuda

Prints the results: `.ci/wheel.sh` compares two wheels. The argument says which of them this environment should have.
"""

import hashlib
import sys

import ddtas
import numpy as np
from ddtas import _ddtas


def main() -> None:
    cuda = sys.argv[1] == "cuda"
    assert ddtas.has_cuda == cuda, f"has_cuda is {ddtas.has_cuda}"
    random = np.random.default_rng(1)
    labels = np.arange(300) // 5
    rows = random.normal(size=(60, 64))[labels] + random.normal(size=(300, 64))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    for mining in ("none", "symmetric", "asms", "at-asms"):
        for given in ((rows, labels), (rows[:90], labels[:90], rows, labels), (rows.astype(np.float16), labels)):
            output = ddtas.loss(*given, settings=ddtas.Settings(mining=mining))
            assert output.loss > 0
            print(mining, float(output.loss).hex(), hashlib.sha256(output.gradient.tobytes()).hexdigest())
    figures = ddtas.evaluate(rows, labels, nmi=True)
    print(figures.recall, figures.r_precision, figures.map_at_r, figures.nmi)

    if cuda:
        # The first call for a GPU, with rows in the host's memory: no torch is needed.
        context = getattr(_ddtas, "CudaContext")()
        try:
            context.query_metrics((0, 0), rows, labels, None, None, None, [1])
        except RuntimeError as error:
            # Of a machine without a driver, and of one with a driver only.
            said = str(error)
            assert "no NVIDIA driver on this machine" in said or "no GPU can be used" in said, said
            assert "\n" not in said, said
            print("a call for the GPU:", said, file=sys.stderr)
        else:
            print("there is a GPU: the error without one is not tested", file=sys.stderr)


if __name__ == "__main__":
    main()
