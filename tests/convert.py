"""Checkpoints of other codes to ours, and ours to what other codes read.

    python tests/convert.py videomae-base videomae.pt           transformers' VideoMAE, a folder
    python tests/convert.py checkpoint-best.pth encoder.pt      weights below any key of a file
    python tests/convert.py runs/dfew/fold1/last.pt s4d.safetensors       ours, to give away

IN is a file of torch.save or of safetensors, or a folder with model.safetensors or
pytorch_model.bin. OUT is written as safetensors if it is called so, else as torch.save does, under
the released names. Beside the weights it keeps the model's settings, with its class names, and the
run's, so that it computes the same to the last bit when it is read again.
"""
import argparse
import json
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import (MODULES, RELEASED_NAMES, S4D, UserError, initialise,  # noqa: E402
                   read_checkpoint, rebuild, released, sincos_table, whole_file)
from pretrain import guarded  # noqa: E402

EMBEDDINGS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
NAMES = (                               # in transformers' VideoMAE, in a layer's order, and ours
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.attention\.attention\.(query|key|value)\.weight$", r".attn.qkv.\1"),
    (r"\.attention\.attention\.(q_bias|query\.bias)$", ".attn.q_bias"),
    (r"\.attention\.attention\.(k_bias|key\.bias)$", ".attn.k_bias"),
    (r"\.attention\.attention\.(v_bias|value\.bias)$", ".attn.v_bias"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "encoder.norm."),
)
HEADS = ("head.", "classifier.", "fc.")  # of a classifier of another task
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
DESCRIPTIONS = ("stage", "architecture", "identity", "made_by")  # what is kept beside the weights
RELEASED_SETTINGS = dict(expert="adapter", k=2, sigma=None, residual=False)  # as released


# ----------------------------------------------------------------------------------- safetensors

def read_safetensors(path: Path) -> tuple[dict, dict]:
    """Tensors by name, and the texts beside them. The file is the length of a header in 8 bytes,
    the header in JSON, and all values, one tensor behind the other."""
    data = memoryview(bytearray(path.read_bytes()))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    metadata = header.pop("__metadata__", {})
    values = data[start:]
    state, last = {}, 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        state[name] = torch.frombuffer(values[begin:end], dtype=dtype).reshape(entry["shape"])
        last = max(last, end)
    if last != len(values):
        raise ValueError(f"its header tells of {last} bytes of values, it has {len(values)}")
    return state, metadata


def write_safetensors(file, state: dict, metadata: dict) -> None:
    """To an open file; metadata: texts by name."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": metadata}, 0
    for name, value in state.items():
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = dict(dtype=names[value.dtype], shape=list(value.shape),
                            data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)     # so that values begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for value in state.values():
        file.write(value.contiguous().flatten().view(torch.uint8).numpy())


# ------------------------------------------------------------------------- what others have written

def read(path: Path, key: str, trust: bool):
    """A checkpoint of ours, or whatever else a file holds. UserError if it cannot be read."""
    try:
        checkpoint = read_checkpoint(path)      # ours and released weights; compares checksums
        if not key:
            return checkpoint
    except UserError as error:
        if not path.exists() or isinstance(error.__cause__, zipfile.BadZipFile):
            raise
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            if not is_safetensors:
                return torch.load(file, map_location="cpu", weights_only=not trust)
        state, metadata = read_safetensors(path)
        if "stage" not in metadata:
            return state
        ours = {name: json.loads(text) for name, text in metadata.items() if name in DESCRIPTIONS}
        return ours | {"model": state}
    except pickle.UnpicklingError as error:
        if trust:
            raise UserError(f"{path} cannot be read: {error}") from error
        raise UserError(
            f"{path} holds objects beside tensors, numbers and text, or is no file of torch.save. "
            "--trust reads objects, which runs whatever code the file brings: only for a file "
            "whose author you trust") from error
    except Exception as error:          # odd contents lead to errors of every kind
        raise UserError(f"{path} cannot be read: {error!r}") from error


def tensors_in(contents, name: str = "") -> dict:
    """Every tensor in nested dictionaries and modules, by its keys joined with dots."""
    if torch.is_tensor(contents):
        return {name: contents.detach()}
    if isinstance(contents, torch.nn.Module):
        contents = contents.state_dict()
    found = {}
    if isinstance(contents, dict):
        for key, value in contents.items():
            found |= tensors_in(value, f"{name}.{key}" if name else str(key))
    return found


def find_model(names, key: str, path: Path) -> str:
    """What the names of a model's weights begin with. UserError if there is none or several."""
    stems = set()
    for name in names:
        for embedding in EMBEDDINGS:
            if name.startswith(key) and name.endswith(embedding):
                stem = name.removesuffix(embedding)
                stems.add(stem.removesuffix("encoder.").removesuffix("videomae."))
    if not stems:
        raise UserError(f"{path} holds no weights of S4D or VideoMAE: no name in it begins with "
                        f"{key!r} and ends with {' or '.join(EMBEDDINGS)}")
    if len(stems) > 1:
        raise UserError(f"{path} holds several models, give --key with one of: "
                        f"{', '.join(sorted(stems))}")
    return stems.pop()


def translate(contents, key: str, path: Path) -> dict:
    """A checkpoint of ours with the weights of another code's file; prints what is left out.
    UserError if there are none, or weights that our models have no place for. The norms' epsilon
    becomes ours, 1e-6 (transformers' is 1e-12)."""
    tensors = tensors_in(contents)
    stem = find_model(tensors, key, path)
    state, left_out, without_place = {}, [], []
    for name, value in tensors.items():
        ours = name.removeprefix(stem)
        for pattern, replacement in NAMES:
            ours = re.sub(pattern, replacement, ours)
        is_position = ours.endswith("pos_embed")
        if not name.startswith(stem) or not value.is_floating_point():
            left_out.append(name)
        elif ours.endswith(".attn.k_bias"):     # the softmax takes a constant out
            left_out.append(name)
        elif is_position and is_our_table(value):       # which each size makes itself
            left_out.append(name)
        elif ours.startswith(RELEASED_NAMES) and not is_position:
            state[ours] = value
        elif ours.startswith(HEADS):
            left_out.append(name)
        else:
            without_place.append(f"{name} {tuple(value.shape)}")
    if without_place:
        raise UserError(f"{path} has weights that S4D has no place for: "
                        f"{', '.join(without_place[:5])} ({len(without_place)} in all)")
    for layer in [name.removesuffix("query") for name in state if name.endswith(".qkv.query")]:
        rows = [state.pop(layer + part, torch.zeros(0)) for part in ("query", "key", "value")]
        state[f"{layer}weight"] = torch.cat(rows)   # one that is missing leaves another shape
    if left_out:
        print(f"left out: {summary(left_out)}")
    if any(name.removeprefix(stem).startswith(HEADS) for name in left_out):
        print("the head of its own task is left out: the encoder remains, to start stage 2 from")
    try:
        return released(state)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no model of ours: {error}") from error


def is_our_table(positions: torch.Tensor) -> bool:
    """Whether positions (1, N, d), which are often kept in files, are those of sincos_table."""
    table = sincos_table(*positions.shape[-2:])
    return torch.allclose(positions.float().reshape(table.shape), table, atol=0.01)


def summary(names: list) -> str:
    """Names that differ by a number only as one, with how many they are."""
    counts = {}
    for name in names:
        name = re.sub(r"\b\d+\b", "*", name)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


# ------------------------------------------------------------------------------------- the command

def convert(source: Path, target: Path, key: str = "", trust: bool = False) -> None:
    """Write `source` as `target`; prints what is left out, and what the weights do not tell.
    UserError if `source` is no model, or `target` is the same file or cannot be written."""
    if source.is_dir():
        inside = [source / "model.safetensors", source / "pytorch_model.bin"]
        source = next((path for path in inside if path.is_file()), None)
        if source is None:
            raise UserError(f"none of {', '.join(map(str, inside))} is there")
    if target.exists() and os.path.samefile(source, target):
        raise UserError(f"{target} is the file to convert itself: give another name")
    checkpoint = read(source, key, trust)
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") not in list(MODULES):
        checkpoint = translate(checkpoint, key, source)
    if checkpoint["stage"] == "finetune":
        module = rebuild(checkpoint, source)
        checkpoint = checkpoint | dict(model=module.state_dict(), architecture=module.architecture)
    else:                               # does the encoder fit, which is all that may be there
        initialise(S4D(checkpoint["architecture"]["size"]), checkpoint, source)
    write(checkpoint, target)
    print(f"{target}: {len(checkpoint['model'])} tensors of stage {checkpoint['stage']}, size "
          f"{checkpoint['architecture']['size']}")
    for line in untold(checkpoint["architecture"]):
        print(line)


def write(checkpoint: dict, path: Path) -> None:
    """Weights and descriptions, without what only --resume needs."""
    kept = {name: checkpoint[name] for name in DESCRIPTIONS if name in checkpoint}
    if path.suffix != ".safetensors":
        with whole_file(path) as file:
            torch.save(kept | {"model": checkpoint["model"]}, file)
        return
    for name, value in kept["architecture"].items():
        if json.loads(json.dumps(value)) != value:
            raise UserError(f"{path}: safetensors cannot keep {name} = {value}: write a .pt file")
    texts = {name: json.dumps(value, default=str) for name, value in kept.items()}
    with whole_file(path) as file:
        write_safetensors(file, checkpoint["model"], texts | {"format": "pt"})


def untold(architecture: dict) -> list:
    """A line on each setting that another code must be told, as no weight shows it."""
    lines = []
    for name, value in RELEASED_SETTINGS.items():
        ours = architecture.get(name, value)
        if architecture.get("moae_layers") and ours != value:
            lines.append(f"another code must be told: {name} = {ours} (released: {value})")
    for name in ("image_classes", "video_classes"):
        if architecture.get(name):
            lines.append(f"{name}, in order: {', '.join(architecture[name])}")
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", metavar="IN", type=Path)
    p.add_argument("target", metavar="OUT", type=Path)
    p.add_argument("--key", default="", help="what the names of the wanted weights begin with, "
                   "where a file holds several models")
    p.add_argument("--trust", action="store_true", help="read pickled objects too, which runs "
                   "whatever code the file brings: only for a file whose author you trust")
    args = p.parse_args()
    convert(args.source, args.target, args.key, args.trust)


if __name__ == "__main__":
    guarded(main)
