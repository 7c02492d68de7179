"""Reads and writes .safetensors files with torch only, without the package safetensors."""

import json
import struct
from pathlib import Path

import torch

TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes the file under a temporary name and renames it."""
    header: dict[str, object] = {"__metadata__": metadata}
    chunks, offset = [], 0
    for name, tensor in tensors.items():
        chunk = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + chunk.nbytes],
        }
        chunks.append(chunk)
        offset += chunk.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for chunk in chunks:
            chunk.tofile(file)
    temporary.rename(path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads tensors and metadata; skips tensors of types that are not in TYPES."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in TYPES:
            start, end = (8 + length + position for position in entry["data_offsets"])
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata
