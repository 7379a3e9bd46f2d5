"""The table of TFLite files, drawn from the results of `benchmarks.deployment`."""

import json
from pathlib import Path

from benchmarks.common.tables import NOTHING, table

# The second file has the latencies of a machine with instructions for int8.
FILES = ("deployment.json", "deployment-vnni.json")


def tables(folder: Path) -> dict[str, str]:
    """The table in Markdown, by name; of results that are there.

    Args:
        folder: Of the results.
    """
    found = [
        json.loads((folder / name).read_text())
        for name in FILES
        if (folder / name).exists()
    ]
    return {"deployment": deployment(found)} if found else {}


def deployment(found: list[dict]) -> str:
    """Files, a row each; the last result's figures, and every one's latencies."""
    last = found[-1]
    lines = []
    for network in last["settings"]["network"]:
        files = last["results"][network]["files"]
        for name in sorted(files, key=_order(last["settings"]["bits"])):
            row = files[name]
            agrees = NOTHING
            if "trained_agrees" in row:
                agrees = f"{100 * row['trained_agrees'] / row['test_images']:.2f}"
            lines.append(
                [
                    f"{network}, {name}",
                    f"{row['size']:.3f}",
                    f"{row['gzip']:.3f}",
                    *(_latency(result, network, name) for result in found),
                    agrees,
                    f"{100 * row['accuracy']:.2f}",
                ]
            )
    headers = ["network, file", "size", "gzip"]
    headers += [f"latency, {_machine(result)}" for result in found]
    return table([*headers, "= trained, %", "accuracy, %"], lines)


def _order(bits: list[str]):
    """What sorts files: float32, the other 8-bit ones, then ours by their bits."""
    names = ["float32", "post-training int8", "TF-MOT 8-bit"]
    names += [f"{each} {storage}" for each in bits for storage in ("int8", "int4")]
    return names.index


def _latency(result, network, name) -> str:
    row = result["results"][network]["files"].get(name)
    return NOTHING if row is None else f"{row['latency to float32']:.2f}"


def _machine(result) -> str:
    """What of a machine int8 depends on."""
    has_int8 = any("vnni" in each for each in result["machine"]["instructions"])
    return "with VNNI" if has_int8 else "without"


def tiny_table(path: Path) -> str:
    """Flash and arena of MLPerf Tiny's networks in TFLite Micro."""
    networks = json.loads(path.read_text())["networks"]
    lines = [
        [
            f"{name}, {bits}",
            f"{found['float']:,}",
            *(f"{row['bytes'][storage]:,}" for storage in ("int8", "packed")),
            *(f"{row['arena'][storage]:,}" for storage in ("int8", "packed")),
            f"{row['bops'] / 1e6:,.0f}",
            "yes" if row["verified"] else "no",
        ]
        for name, found in networks.items()
        for bits, row in found["bits"].items()
    ]
    headers = ["network", "float file, bytes", "file, int8", "file, packed"]
    headers += ["arena, int8", "arena, packed", "bit operations, millions"]
    return table([*headers, "passes verify"], lines)
