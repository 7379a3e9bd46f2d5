"""The networks of `tf_keras.applications`, and how each is made small.

Nothing here imports TensorFlow: the table is drawn from the committed files alone.
"""

from pathlib import Path

import tabulate

from benchmarks.common import store

BATCH = 4
# Of weights and activations; the second where the first leaves weights not finite.
QUANTIZERS = ("dorefa", "lsq")
STEPS = {
    "quantize": "quantized",
    "train": "trained",
    "levels": "levels",
    "reload": "reloaded",
    "export": "exported",
    "verify": "file = twin",
}
NAMES = (
    *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
    *(f"DenseNet{depth}" for depth in (121, 169, 201)),
    *(f"EfficientNetB{scale}" for scale in range(8)),
    *(f"EfficientNetV2{scale}" for scale in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Large",
    "MobileNetV3Small",
    "NASNetLarge",
    "NASNetMobile",
    *(
        f"RegNet{family}{size}"
        for family in "XY"
        for size in (
            *("002", "004", "006", "008", "016", "032"),
            *("040", "064", "080", "120", "160", "320"),
        )
    ),
    *(f"ResNet{depth}{v}" for depth in (50, 101, 152) for v in ("", "V2")),
    *(f"ResNetRS{depth}" for depth in (50, 101, 152, 200, 270, 350, 420)),
    "VGG16",
    "VGG19",
    "Xception",
)
# The least that they take.
_SIDES = {"Inception": 75, "Xception": 71}
# With the scaling of pixels as a part of the network.
_TAKES_PIXELS = ("ConvNeXt", "EfficientNet", "MobileNetV3", "RegNet", "ResNetRS")


def options(name: str) -> dict:
    """Arguments of the network's function."""
    side = next((s for start, s in _SIDES.items() if name.startswith(start)), 32)
    return {"input_shape": (side, side, 3)}


def pixels(name: str) -> tuple[float, float]:
    """The range of the values that it reads."""
    return (0.0, 255.0) if name.startswith(_TAKES_PIXELS) else (-1.0, 1.0)


def table(results: Path) -> str:
    """What works, in Markdown: one line for each network that has a result."""
    every, lines = store.read(results), []
    for name in NAMES:
        if name not in every:
            continue
        found = every[name]
        marks = {True: "yes", False: "no", None: "—"}
        split = ", split" if "split" in found["steps"] else ""
        lines.append(
            [
                f"{name}{split}",
                str(found["layers"]),
                str(found.get("quantized_weights", 0)),
                str(found.get("quantized_activations", 0)),
                *(marks[found["steps"].get(step)] for step in STEPS),
                _note(found),
            ]
        )
    if not lines:
        return "Not run yet."
    headers = ["network", "layers", "weights", "activations", *STEPS.values(), "note"]
    align = ["left", *["right"] * 3, *["left"] * 7]
    return tabulate.tabulate(
        lines, headers, tablefmt="github", disable_numparse=True, colalign=align
    )


def _note(found) -> str:
    """What a line of the table says besides."""
    said = []
    for kind in found.get("overflows", ()):
        said.append(f"{kind}: weights not finite")
    if said and found["quantizer"] not in found["overflows"]:
        said.append(f"by {found['quantizer']} instead")
    if "refused" in found:
        said.append(found["refused"].replace("|", "/"))
    return "; ".join(said)
