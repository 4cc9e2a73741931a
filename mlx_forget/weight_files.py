"""The weight files of a checkpoint: which they are, that none is pickled or cut short, and one tensor at a time out of them or into one.

A safetensors file is read and written by its header alone: no framework, and no more memory than one tensor.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.durable_files import read_object, sha256_of
from mlx_forget.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_HEADER_LIMIT = 100_000_000
_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
# The types that weights are written as, by their name in a config.json, with their bytes.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NUM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def weight_files(place: Path) -> list[Path]:
    """The safetensors of a checkpoint, given its folder or one file.

    Raises:
        UserError: none there, pickled ones only, or a part that the index names is missing.
    """
    if place.is_file():
        return [place]
    if (place / INDEX).is_file():
        try:
            names = sorted(set(read_object(place / INDEX)["weight_map"].values()))
            if not all(isinstance(name, str) and name for name in names):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{place / INDEX} is damaged: fetch the checkpoint again.") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{place / INDEX} names files outside of the checkpoint, which is refused.")
        missing = [name for name in names if not os.path.isfile(place / name)]
        if missing:
            raise UserError(f"{place} lacks {len(missing)} of its {len(names)} weight files ({missing[0]}): fetch it again.")
        return [place / name for name in names]
    found = [place / WEIGHTS] if (place / WEIGHTS).is_file() else sorted(place.glob("model*.safetensors"))
    if not found:
        refuse_pickles(place)
        raise UserError(f"{place} has a config.json but no weights: it needs {WEIGHTS}.")
    return found


def refuse_pickles(folder: Path) -> None:
    """Pickled weights can run code when they are opened.

    Raises:
        UserError: the folder has such weights and no others, with the way to convert them.
    """
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    pickled = [file.name for file in files if file.suffix in _PICKLES]
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"{folder} holds pickled weights only ({', '.join(pickled[:3])}), which can run code when they are opened. Convert them where "
            "you trust them: transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
        )


def weights_sha256(folder: Path) -> str:
    """A hash of all weight files. In the Hub's cache a large file is named by its own, which saves reading it."""
    hashes = []
    for file in weight_files(folder):
        name = file.resolve().name
        if _SHA256.fullmatch(name):
            hashes.append(name)
            continue
        hashes.append(sha256_of(file))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def tensor_names(file: Path) -> list[str]:
    """The weights in a safetensors file."""
    return [name for name in read_header(file) if name != "__metadata__"]


def tensor_dtype(file: Path, name: str) -> str:
    """The type of a weight, as the header names it."""
    return str(read_header(file)[name]["dtype"])


def read_tensor(file: Path, name: str) -> npt.NDArray[np.float32]:
    """One weight as float32, also of a type that NumPy does not have."""
    entry = read_header(file)[name]
    with file.open("rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        begin, end = entry["data_offsets"]
        handle.seek(start + begin)
        content = handle.read(end - begin)
    if entry["dtype"] == "BF16":
        # The upper half of a float32.
        values = (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif entry["dtype"] in _DTYPES:
        values = np.frombuffer(content, _DTYPES[entry["dtype"]]).astype(np.float32)
    else:
        raise UserError(f"{file}: {name} has the type {entry['dtype']}, which is not read here: give the original checkpoint.")
    return values.reshape(entry["shape"])


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[npt.NDArray[np.float32]],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write float32 tensors as safetensors, in the order of their shapes, one at a time.

    Args:
        dtypes: what each is written as, as a safetensors header names it: F32, BF16 or F16, rounded to nearest; None is F32.

    Raises:
        UserError: a number that its type cannot hold.
    """
    dtypes = dict.fromkeys(shapes, "F32") if dtypes is None else dtypes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _NUM_BYTES[dtypes[name]] * math.prod(shape)
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), value in zip(shapes.items(), values, strict=True):
            assert value.shape == tuple(shape)
            handle.write(_stored(name, np.ascontiguousarray(value, "<f4"), dtypes[name]).data)


def _stored(name: str, value: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """A tensor as the bytes of its type."""
    if dtype == "F32":
        return value
    made: npt.NDArray[Any]
    if dtype == "F16":
        with np.errstate(over="ignore"):
            made = value.astype("<f2")
        whole = np.isfinite(made)
    else:
        # To the nearest of the numbers whose lower half is empty, to the even one in the middle.
        bits = value.view("<u4")
        made = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        made = np.where(np.isnan(value), np.array(0x7FC0, "<u2"), made)
        whole = (made & 0x7F80) != 0x7F80
    if (np.isfinite(value) & ~whole).any():
        raise UserError(f"{name} holds numbers that {dtype} cannot: write it as float32.")
    return made


def read_header(file: Path) -> dict[str, Any]:
    """The table of contents of a safetensors file."""
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if not 2 <= size <= _HEADER_LIMIT:
                raise ValueError
            header = json.loads(handle.read(size))
            end = max((_end_of(entry) for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is not a whole safetensors file: fetch or convert it again.") from None
    if file.stat().st_size != 8 + size + end:
        raise UserError(f"{file} is cut short ({file.stat().st_size:,} of {8 + size + end:,} bytes): fetch it again.")
    result: dict[str, Any] = header
    return result


def _end_of(entry: dict[str, Any]) -> int:
    """Where the bytes of a tensor end, if they are as many as its shape needs."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(isinstance(size, int) and size >= 0 for size in (begin, end, *shape)) or not isinstance(entry["dtype"], str):
        raise TypeError
    bits = re.fullmatch(r"(?:BF|[FIUC])(\d+)", entry["dtype"])
    if end < begin or (bits is not None and 8 * (end - begin) != int(bits[1]) * math.prod(shape)):
        raise ValueError
    return int(end)
