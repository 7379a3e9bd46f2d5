"""Tables of the comparison with other libraries, drawn from its files alone."""

import math
import statistics
from pathlib import Path

from benchmarks.accuracy import plan as sweep
from benchmarks.accuracy import rows as accuracy_rows
from benchmarks.common import store
from benchmarks.common.tables import NOTHING
from benchmarks.common.tables import table as markdown_table
from benchmarks.peers import plan as peers_plan

_FLOAT = "float, which all start from"
# Network, method and bits -> what each seed gave.
_Runs = dict[tuple, dict[int, dict]]


def tables(folder: Path) -> dict[str, str]:
    """The tables in Markdown, by name; what was not run is left out.

    Args:
        folder: Of the results.

    Raises:
        ValueError: If trainings of different settings are among them.
    """
    every = trainings(folder)
    made = {
        **{f"accuracy {network}": accuracy_table(every, network)
           for network in peers_plan.NETWORKS},
        "step cost": step_table(folder),
        "memory": memory_table(folder),
        "deployment": deployment_table(every),
        "refused": refusal_table(every),
    }  # fmt: skip
    return {name: table for name, table in made.items() if table}


def trainings(folder: Path) -> dict[str, _Runs]:
    """All trainings that were measured on the test set, by purpose.

    Raises:
        ValueError: If their settings differ.
    """
    found: dict[str, _Runs] = {"float": {}, "equal": {}, "deployment": {}}
    for _, run in accuracy_rows.read_alike(folder):
        if run["purpose"] in found and run["seed"] not in sweep.TUNING_SEEDS:
            bits = run["bits"] and tuple(run["bits"])
            key = (run["network"], run["method"], bits)
            found[run["purpose"]].setdefault(key, {})[run["seed"]] = run
    return found


def accuracies(runs: dict[int, dict]) -> dict[int, float]:
    """Accuracy in percent by seed, of the seeds that have one."""
    found = {seed: run.get("accuracy", None) for seed, run in runs.items()}
    return {seed: 100 * value for seed, value in found.items() if value is not None}


def accuracy_table(every: dict[str, _Runs], network: str) -> str:
    """Accuracy after the last epoch, and paired differences from both of ours."""
    equal, lines = every["equal"], []
    start = accuracies(every["float"].get((network, sweep.FLOAT, None), {}))
    if start:
        lines.append([_FLOAT, "", "", _with_error(start), NOTHING, NOTHING])
    for bits in peers_plan.BITS:
        ours = [accuracies(equal.get((network, o, bits), {})) for o in peers_plan.OURS]
        for method in (*peers_plan.OURS, *peers_plan.PEERS):
            runs = equal.get((network, method, bits), {})
            if not runs:
                continue
            values = accuracies(runs)
            lines.append(
                [
                    peers_plan.NAMES[method],
                    accuracy_rows.label(bits),
                    f"{next(iter(runs.values()))['learning_rate']:g}" if values else "",
                    _accuracy_cell(runs, values),
                    *(NOTHING if method == name else _plus_minus(values, other)
                      for name, other in zip(peers_plan.OURS, ours, strict=True)),
                ]
            )  # fmt: skip
    files = every["deployment"].get((network, peers_plan.POST_TRAINING, (8, 8)), {})
    if files:
        values = accuracies({seed: run["file"] for seed, run in files.items()})
        name = peers_plan.NAMES[peers_plan.POST_TRAINING]
        lines.append([name, "W8A8", "", _with_error(values), NOTHING, NOTHING])
    headers = ["library", "bits", "learning rate", "accuracy, %"]
    headers += [f"minus {name}" for name in peers_plan.OURS.values()]
    return _table(headers, lines)


def _accuracy_cell(runs, values):
    for reason in ("refused", "diverged"):
        count = sum(run.get(reason) is not None for run in runs.values())
        if count:
            return reason if count == len(runs) else f"{reason}: {count} of {len(runs)}"
    return _with_error(values)


def _with_error(values: dict[int, float]) -> str:
    every = list(values.values())
    error = accuracy_rows.standard_error(every)
    shown = "" if math.isnan(error) else f" ± {error:.2f}"
    return f"{statistics.mean(every):.2f}{shown}"


def _plus_minus(values, other) -> str:
    mean, half = accuracy_rows.paired(values, other)
    if math.isnan(mean):
        return NOTHING
    return f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def step_table(folder: Path) -> str:
    """CPU time of a step, relative to float and to ours, without and with oneDNN."""
    costs = store.read(peers_plan.costs_file(folder))
    found = {
        onednn: {(r["step"], r["relative to"]): r for r in costs[name]["ratios"]}
        for onednn in peers_plan.ONEDNN
        if (name := peers_plan.step_cost_name(onednn)) in costs
    }
    bases = ["float", *peers_plan.OURS]
    lines = [
        [peers_plan.NAMES[variant]]
        + [_ratio_cell(found[onednn].get((variant, base)))
           for onednn in found for base in bases]
        for variant in peers_plan.MEASURED[1:]
        if found
    ]  # fmt: skip
    headers = ["W2A2 step of"] + [
        f"to {peers_plan.NAMES.get(base, base)}" + ("" if onednn == "0" else ", oneDNN")
        for onednn in found
        for base in bases
    ]
    return _table(headers, lines)


def _ratio_cell(ratio: dict | None) -> str:
    if ratio is None:
        return NOTHING
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['largest']:.2f})"


def memory_table(folder: Path) -> str:
    """Growth of the peak memory, relative to the float training's median."""
    growth: dict[tuple[str, str], list[int]] = {}
    for name, run in sorted(store.read(peers_plan.costs_file(folder)).items()):
        if name.startswith("memory/"):
            key = run["variant"], run["allocator"]
            growth.setdefault(key, []).append(run["growth_kilobytes"])
    lines = [
        [
            peers_plan.NAMES.get(variant, variant),
            *(
                cell
                for allocator in peers_plan.ALLOCATORS
                for cell in _memory_cells(growth, variant, allocator)
            ),
        ]
        for variant in peers_plan.MEASURED
        if (variant, "in-use") in growth
    ]
    headers = ["W2A2 training with", "MiB in use", "relative to float"]
    headers += ["MiB with glibc", "relative to float"]
    return _table(headers, lines) if lines else ""


def _memory_cells(growth: dict, variant: str, allocator: str) -> list[str]:
    kilobytes = growth[variant, allocator]
    base = statistics.median(growth["float", allocator])
    ratios = [value / base for value in kilobytes]
    middle, least, largest = statistics.median(ratios), min(ratios), max(ratios)
    return [
        f"{statistics.median(kilobytes) / 1024:.0f}",
        f"{middle:.2f} ({least:.2f} to {largest:.2f})",
    ]


def deployment_table(every: dict[str, _Runs]) -> str:
    """What became of the first seed's network as a TFLite file."""
    lines = []
    for network in peers_plan.NETWORKS:
        for method, name in peers_plan.NAMES.items():
            purpose = "equal" if method in peers_plan.PEERS else "deployment"
            for bits in (*peers_plan.BITS, (8, 8)):
                run = every[purpose].get((network, method, bits), {}).get(0)
                if run and "file" in run:
                    head = [network, name, accuracy_rows.label(bits)]
                    lines.append([*head, *_file_cells(run["file"])])
    headers = ["network", "library", "bits", "size", "convolutions (input x weights)"]
    headers += ["operators (float file)", "ROUND", "= trained, %"]
    headers += ["accuracy, %", "trained, %"]
    return _table(headers, lines)


def _file_cells(file: dict) -> list[str]:
    if "refused" in file:
        return ["refused", *[NOTHING] * 6]
    kinds = file["operators"]
    return [
        f"{file['bytes'] / file['float_bytes']:.3f}",
        ", ".join(f"{count} {types}" for types, count in file["convolutions"].items()),
        f"{sum(kinds.values())} ({sum(file['float_operators'].values())})",
        str(kinds.get("ROUND", 0)),
        f"{100 * file['trained_agrees'] / file['test_images']:.2f}",
        f"{100 * file['accuracy']:.2f}",
        f"{100 * file['trained_accuracy']:.2f}",
    ]


def refusal_table(every: dict[str, _Runs]) -> str:
    """What the libraries said where they refused, in the first words for each network.

    The converter's messages hold ranges, which differ from run to run.
    """
    said: dict[tuple, str] = {}
    labels: dict[tuple, list[str]] = {}
    for (network, method, bits), runs in sorted(every["equal"].items()):
        for _, run in sorted(runs.items()):
            step, message = "network", run.get("refused")
            if not message:
                step, message = "TFLite file", run.get("file", {}).get("refused")
            label = accuracy_rows.label(bits)
            key = (network, method, step)
            if message and label not in labels.setdefault(key, []):
                labels[key].append(label)
                said.setdefault(key, message.replace("|", "\\|"))
    lines = [
        [network, peers_plan.NAMES[method], ", ".join(labels[key]), step, message]
        for key, message in said.items()
        for network, method, step in [key]
    ]
    return _table(["network", "library", "bits", "of what", "message"], lines)


def _table(headers: list[str], lines: list[list]) -> str:
    return markdown_table(headers, lines) if lines else ""
