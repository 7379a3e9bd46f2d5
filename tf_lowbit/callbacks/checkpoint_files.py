"""What is in a checkpoint's folder beside its variables: of what model, and intact."""

import hashlib
import itertools
import json
import os
from pathlib import Path

from tf_lowbit import inspection
from tf_lowbit.compat import keras

_FORMAT = 1
_MANIFEST = "manifest.json"
_SIGNATURE = "signature.json"
_QUANTIZERS = "quantizers.json"


def difference(model, folder: Path) -> str:
    """Says in what a model is not that of a checkpoint; empty if in nothing."""
    if (folder / _QUANTIZERS).exists():  # Earlier versions wrote none.
        saved = json.loads((folder / _QUANTIZERS).read_text())
        pairs = itertools.zip_longest(
            saved, _quantizers(model), fillvalue=["nothing", "the end"]
        )
        # Names are told, not compared: Keras numbers the layers that got none.
        for (theirs, at), (own, own_at) in pairs:
            if theirs != own:
                return f"{theirs} at {at}, where the model has {own} at {own_at}"
    saved = json.loads((folder / _SIGNATURE).read_text())
    pairs = itertools.zip_longest(saved, _signature(model), fillvalue="nothing")
    for theirs, own in pairs:
        if theirs != own:
            return f"{theirs}, where the model has {own}"
    return ""


def _signature(model) -> list[str]:
    """What a checkpoint and the model that it is restored into must have in common."""
    state = model.optimizer.variables if has_plain_optimizer(model) else []
    return [
        *(f"weights of shape {weight.shape}" for weight in model.weights),
        f"the optimizer {type(model.optimizer).__name__}",
        *(f"optimizer state of shape {value.shape}" for value in state),
    ]


def _quantizers(model) -> list[list[str]]:
    """Each quantizer, as its rule has made it, and the tensor that it stands at.

    A stage's bits, like a calibrated or a learned range and a sign that data told, are
    variables: not in here.
    """
    tensors = inspection.quantized_tensors(model)
    return [[repr(tensor.declared), tensor.name] for tensor in tensors]


def has_plain_optimizer(model) -> bool:
    """Whether the optimizer's state is known ahead of the first step.

    A legacy optimizer makes it as it goes, and a `train_step` of the model's own need
    not train all variables, or with one optimizer only.
    """
    is_legacy = not hasattr(model.optimizer, "build")
    return type(model).train_step is keras.Model.train_step and not is_legacy


def write_identity(model, folder: Path) -> None:
    """Writes down what the model of a checkpoint is."""
    (folder / _SIGNATURE).write_text(json.dumps(_signature(model)))
    (folder / _QUANTIZERS).write_text(json.dumps(_quantizers(model)))


def write_manifest(folder: Path, position, steps: int | None) -> None:
    """Writes down what is in a folder, and flushes all of it to the disk.

    Args:
        folder: of the checkpoint.
        position: named tuple (epoch, step).
        steps: in an epoch; None where that is not known.
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
    """The steps in an epoch when a checkpoint was made; None of earlier versions'."""
    return json.loads((folder / _MANIFEST).read_text()).get("steps")


def flaw(folder: Path, position) -> str:
    """Says what is wrong with a checkpoint; empty if it is intact."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST} is of format {manifest['format']!r}, not {_FORMAT}"
        if (manifest["epoch"], manifest["step"]) != position:
            return f"{_MANIFEST} is of another position"
        for name, file in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
            if _digest(folder / name) != file["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        # A read that fails, unlike an opening, does not name its file.
        name = Path(error.filename or folder).name
        return f"{name} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, LookupError, AttributeError):
        return f"{_MANIFEST} is not one"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
