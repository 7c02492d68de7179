"""One loss over a batch whose activations do not fit in memory: the network sees it in chunks, twice.

    pip install '.[torch]' && python examples/python/chunked_batch.py

First all chunks are embedded without a graph; then one loss over all embeddings; then each chunk is embedded again, and goes
back with its rows of dL/dE (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
Both passes must embed alike: no BatchNorm that trains, and dropout only with the generator's state put back.
"""

import copy

import torch
from ddtas.torch import SoftContrastiveLoss

ROWS, CHUNK, CLASSES, INPUTS, HIDDEN, DIM = 1_200, 130, 200, 48, 96, 32


def at_once(model, loss_fn, inputs, labels):
    loss = loss_fn(model(inputs), labels)
    loss.backward()
    return loss


def in_chunks(model, loss_fn, inputs, labels):
    with torch.no_grad():
        embeddings = torch.cat([model(chunk) for chunk in inputs.split(CHUNK)])
    loss = loss_fn(embeddings.requires_grad_(), labels)
    loss.backward()
    for chunk, upstream in zip(inputs.split(CHUNK), embeddings.grad.split(CHUNK)):
        # A sum whose gradient with respect to the embeddings is dL/dE.
        (model(chunk) * upstream).sum().backward()
    return loss


def main() -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, DIM))
    again, loss_fn = copy.deepcopy(model), SoftContrastiveLoss()
    labels = torch.arange(ROWS) % CLASSES
    inputs = torch.randn(CLASSES, INPUTS)[labels] + 1.2 * torch.randn(ROWS, INPUTS)

    whole = at_once(model, loss_fn, inputs, labels).item()
    active = loss_fn.statistics["active"]
    chunked = in_chunks(again, loss_fn, inputs, labels).item()
    print(f"{ROWS} rows, activations of {CHUNK} at a time")
    print(f"loss in chunks {chunked:.9f}, at once {whole:.9f}, {active} anchors active")
    assert active > 0, "the comparison needs a loss"
    assert abs(chunked - whole) <= 1e-5 * whole
    for (name, wanted), got in zip(model.named_parameters(), again.parameters()):
        error = ((got.grad - wanted.grad).abs().max() / wanted.grad.abs().max()).item()
        print(f"gradient of {name} within {error:.1e} of its largest entry")
        assert error <= 1e-4


if __name__ == "__main__":
    main()
