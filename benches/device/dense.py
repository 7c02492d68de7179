"""The loss of SPEC 1-4 in dense torch, as a careful user would write it without ddtas.

`python3 benches/device/dense.py tests/golden` checks it against the reference cases.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import softplus

import tensors

SETTINGS = {
    "gamma": 0.1,
    "neg_ratio": 0.1,
    "probe_neg_ratio": 0.1,
    "tolerance": 0.5,
    "adaptive": True,
    "alpha": 40.0,
    "beta": 2.0,
    "lam_pos": 0.7,
    "lam_neg": 0.7,
}


def mine(similarity: torch.Tensor, labels: torch.Tensor, settings: dict = SETTINGS):
    """Masks of the mined positives, of the mined negatives and of all negatives, [B, B] (SPEC 1-3)."""
    known = labels >= 0
    pairs = known[:, None] & known[None, :]
    same = labels[:, None] == labels[None, :]
    positive = pairs & same & (similarity < 1 - 1e-6)
    positive.fill_diagonal_(False)
    negative = pairs & ~same
    min_pos = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    max_neg = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)

    gamma = settings["gamma"]
    gamma_neg = gamma * settings["neg_ratio"]
    probe = negative & (similarity > min_pos - gamma * settings["probe_neg_ratio"])
    rho = probe.sum() / positive.sum().clamp(min=1)
    # A tensor instead of a branch, so that the host does not wait for the device.
    t = torch.where(rho > 1, settings["tolerance"] * torch.sigmoid(rho), 0.0) if settings["adaptive"] else 0.0
    kept_pos = positive & (similarity < max_neg + gamma * (1 + t))
    kept_neg = negative & (similarity > min_pos - gamma_neg * (1 - t))
    return kept_pos, kept_neg, negative


def loss(embeddings: torch.Tensor, labels: torch.Tensor, settings: dict = SETTINGS) -> torch.Tensor:
    """The soft contrastive loss (SPEC 4); autograd gives the gradient."""
    similarity = embeddings @ embeddings.T
    if similarity.dtype in (torch.float16, torch.bfloat16):
        similarity = similarity.float()
    with torch.no_grad():
        kept_pos, kept_neg, _ = mine(similarity, labels, settings)
        count_pos, count_neg = kept_pos.sum(1), kept_neg.sum(1)
        active = (count_pos > 0) & (count_neg > 0)
        weight_pos = torch.where(active, 2 / settings["beta"] / count_pos.clamp(min=1), 0)
        weight_neg = torch.where(active, 2 / settings["alpha"] / count_neg.clamp(min=1), 0)
    term_pos = softplus(-settings["beta"] * (similarity - settings["lam_pos"]))
    term_neg = softplus(settings["alpha"] * (similarity - settings["lam_neg"]))
    rows = (term_pos * kept_pos).sum(1) * weight_pos + (term_neg * kept_neg).sum(1) * weight_neg
    return rows.sum() / len(labels)


def mined_share(embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of all negative pairs that is mined."""
    with torch.no_grad():
        _, kept_neg, negative = mine((embeddings @ embeddings.T).float(), labels)
        return (kept_neg.sum() / negative.sum().clamp(min=1)).item()


def check_against(folder: Path) -> bool:
    """Compares loss and gradient, in float64, with every reference case of a folder."""
    cases = sorted(folder.glob("*.safetensors"))
    passed = bool(cases)
    for path in cases:
        case, metadata = tensors.load(path)
        settings = {name: float(metadata[name]) for name in SETTINGS if name != "adaptive"}
        settings["adaptive"] = metadata["adaptive"] == "true"
        embeddings = case["embeddings"].double().requires_grad_()
        value = loss(embeddings, case["labels"], settings)
        value.backward()
        error = (embeddings.grad - case["expected.grad"]).abs().max() / case["expected.grad"].abs().max().clamp(min=1e-300)
        error = max(error.item(), (value - case["expected.loss"]).abs().item())
        print(f"{path.stem}: worst error {error:.1e}")
        # Divisions by counts are in float32; a wrong set of pairs would give 1e-3 or more.
        passed &= error < 1e-6
    return passed


if __name__ == "__main__":
    sys.exit(0 if check_against(Path(sys.argv[1])) else 1)
