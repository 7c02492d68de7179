"""Times ddtas.torch's loss, forward and backward, on tensors in the GPU's memory; prints one JSON array.

    python3 benches/device/module.py --batch 1024,16384 --dtype bf16

Before a batch is timed, its loss and gradient are compared with those of dense.py in float64, if its B x B matrices fit in free
memory (up to --most rows); an error beyond the bounds ends the program.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

import dense
from baselines import TYPES, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from python_loss import draw  # noqa: E402

# Largest error relative to the gradient's norm: M and the gradients that torch returns are rounded to the rows' type.
BOUNDS = {"f32": 1e-4, "f16": 2e-3, "bf16": 1e-2}
# B x B matrices of float64 that dense.py and its derivatives have in memory at once, generously.
DENSE_MATRICES = 24


def check(rows: torch.Tensor, labels: torch.Tensor, bound: float) -> dict[str, float]:
    """Errors of loss and gradient with respect to unit rows, compared with float64."""
    from ddtas.torch import SoftContrastiveLoss

    leaf = rows.clone().requires_grad_()
    value = SoftContrastiveLoss(normalize_embeddings=False)(leaf, labels)
    value.backward()
    wide = rows.double().requires_grad_()
    truth = dense.loss(wide, labels)
    truth.backward()
    errors = {
        "loss": abs(value.item() / truth.item() - 1),
        "gradient": ((leaf.grad.double() - wide.grad).norm() / wide.grad.norm()).item(),
    }
    if not (errors["loss"] <= 1e-4 and errors["gradient"] <= bound):
        sys.exit(f"module.py: B = {len(rows)}: loss off by {errors['loss']:.1e} (1e-4 allowed), "
                 f"gradient by {errors['gradient']:.1e} ({bound:.0e} allowed)")
    return errors


def most_compared(device: str) -> int:
    """Rows of the largest batch whose dense float64 loss fits in the GPU's free memory."""
    if device == "cpu":
        return 4096
    free, _ = torch.cuda.mem_get_info(device)
    return int((free / (DENSE_MATRICES * 8)) ** 0.5)


def run(batch: int, options: argparse.Namespace) -> dict:
    from ddtas.torch import SoftContrastiveLoss

    rows, labels = draw(batch, options.dim, options.noise)
    rows, labels = normalize(rows, dim=1).to(options.device, TYPES[options.dtype]), labels.to(options.device)
    errors = check(rows, labels, BOUNDS[options.dtype]) if batch <= options.most else None
    loss, leaf = SoftContrastiveLoss(), rows.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        loss(leaf, labels).backward()

    row = {"batch": batch, "dim": options.dim, "dtype": options.dtype, "errors": errors}
    try:
        row["time_ms"], row["time_spread_ms"] = measure(step, options.seconds, options.device)
    except RuntimeError as error:
        row["reason"] = str(error).splitlines()[0][:160]
    print(f"module {batch} {options.dtype}: {row.get('time_ms', row.get('reason'))} ms, {errors}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1024, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=TYPES, default="bf16")
    parser.add_argument("--noise", type=float, default=2.7, help="length of the noise over that of a centre; 2.7: some 8 %% mined")
    parser.add_argument("--most", type=int, help="rows up to which the answer is compared (default: as many as fit; on the CPU 4096)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.most = most_compared(options.device) if options.most is None else options.most
    print(json.dumps([run(batch, options) for batch in options.batch], indent=1))


if __name__ == "__main__":
    main()
