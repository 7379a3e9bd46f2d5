"""Files of a checkpoint besides its variables: identity of the model, and hashes."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from tf_lowbit.compat import keras
from tf_lowbit.core.files import flush
from tf_lowbit.network import inspection

_FORMAT = 1
_MANIFEST = "manifest.json"
_SIGNATURE = "signature.json"
_QUANTIZERS = "quantizers.json"


class Position(NamedTuple):
    """Where a training continues. Later positions compare as greater.

    Attributes:
        epoch: Epoch to continue with, from 0.
        step: Number of its steps that are done, in [0, steps per epoch).
    """

    epoch: int
    step: int


def difference(model: keras.Model, folder: Path) -> str:
    """The first difference between a model and that of a checkpoint, or ""."""
    if (folder / _QUANTIZERS).exists():  # Earlier versions wrote none.
        saved = json.loads((folder / _QUANTIZERS).read_text())
        pairs = itertools.zip_longest(
            saved, _quantizers(model), fillvalue=["nothing", "the end"]
        )
        # Names are only for the message: Keras numbers unnamed layers.
        for (theirs, at), (own, own_at) in pairs:
            if theirs != own:
                return f"{theirs} at {at}, where the model has {own} at {own_at}"
    saved = json.loads((folder / _SIGNATURE).read_text())
    entries = itertools.zip_longest(saved, _signature(model), fillvalue="nothing")
    for theirs, own in entries:
        if theirs != own:
            return f"{theirs}, where the model has {own}"
    return ""


def _signature(model) -> list[str]:
    """Weights and optimizer that a checkpoint must share with a model, in words."""
    state = model.optimizer.variables if has_plain_optimizer(model) else []
    return [
        *(f"weights of shape {weight.shape}" for weight in model.weights),
        f"the optimizer {type(model.optimizer).__name__}",
        *(f"optimizer state of shape {value.shape}" for value in state),
    ]


def _quantizers(model) -> list[list[str]]:
    """Each quantizer as its rule made it, and its tensor.

    Bits of a stage, calibrated or learned ranges, and signs from data are variables, so
    they are not included.
    """
    tensors = inspection.quantized_tensors(model)
    return [[repr(tensor.declared), tensor.name] for tensor in tensors]


def has_plain_optimizer(model: keras.Model) -> bool:
    """Whether the optimizer's state can be built before the first step.

    A legacy optimizer makes it during training. A model's own `train_step` may train
    only some variables, or use several optimizers.
    """
    is_legacy = not hasattr(model.optimizer, "build")
    return type(model).train_step is keras.Model.train_step and not is_legacy


def write_identity(model: keras.Model, folder: Path) -> None:
    """Writes the identity of a checkpoint's model: its signature and quantizers."""
    (folder / _SIGNATURE).write_text(json.dumps(_signature(model)))
    (folder / _QUANTIZERS).write_text(json.dumps(_quantizers(model)))


def write_manifest(folder: Path, position: Position, steps: int | None) -> None:
    """Writes the manifest of a checkpoint, and flushes all its files to the disk.

    Args:
        folder: Folder of the checkpoint.
        position: Position of the checkpoint.
        steps: Steps in an epoch; None if unknown.
    """
    files = {}
    for path in folder.iterdir():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        flush(path)
    manifest = {"format": _FORMAT, **position._asdict()}
    manifest |= {"steps": steps and int(steps), "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    flush(folder / _MANIFEST)
    flush(folder)


def steps_of(folder: Path) -> int | None:
    """The steps in an epoch of a checkpoint; None if an earlier version wrote it."""
    return json.loads((folder / _MANIFEST).read_text()).get("steps")


def flaw(folder: Path, position: Position) -> str:
    """The damage of a checkpoint; "" if it is intact."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} has format {manifest['format']!r}, not {_FORMAT}"
        if (manifest["epoch"], manifest["step"]) != position:
            return f"{_MANIFEST} names another position"
        for name, file in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
            if _digest(folder / name) != file["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        # Unlike a failed open, a failed read does not name its file.
        name = Path(error.filename or folder).name
        return f"{name} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, LookupError, AttributeError):
        return f"{_MANIFEST} is not a manifest"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
