import json
import re
import subprocess
import sys

import pytest

import tf_lowbit as tfl
from benchmarks.deployment import report as deployment_report
from tests.examples import programs
from tf_lowbit.analysis import environment

RESULTS = programs.ROOT / "benchmarks" / "results"
SETTINGS = {
    "dataset": "digits",
    "limit": 32,
    "float_epochs": 1,
    "epochs": 1,
    "tensor_batches": 1,
    "rounds": 1,
    "seed": 3,
}
# At 4 bits these activations have no INT4 codes: that file is refused.
OURS = "W4A4 int8"
PEERS = ["float32", "post-training int8", "TF-MOT 8-bit"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Output, JSON and folder of a tiny run."""
    folder = tmp_path_factory.mktemp("deployment")
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    flags += ["--network=plain_cnn", "--bits=W4A4", "--folder=networks"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.deployment",
            *flags,
            "--output=deployment.json",
        ],
        cwd=folder,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "deployment.json").read_text())
    return done.stdout, result, folder


def test_every_file_is_measured_and_ours_are_verified(measured):
    _, result, folder = measured
    assert list(result["results"]) == ["plain_cnn"]
    found = result["results"]["plain_cnn"]
    assert list(found["refused"]) == ["W4A4 int4"]
    assert "storage='int4' holds codes in [-7, 7]" in found["refused"]["W4A4 int4"]
    assert set(found["files"]) == {OURS, *PEERS}
    base = found["files"]["float32"]
    for row in found["files"].values():
        assert row["size"] == row["bytes"] / base["bytes"]
        assert row["gzip"] == row["gzip_bytes"] / base["bytes"]
        assert 0 <= row["accuracy"] <= 1
        for peer in PEERS:
            assert row[f"latency to {peer}"] > 0
    assert base["latency to float32"] == 1
    row = found["files"][OURS]
    assert row["verified"]
    assert row["failures"] == []
    assert row["mismatches"] == row["end_to_end_mismatches"] == 0
    assert row["twin_agrees"] == row["test_images"] == 32
    assert row["codes"] > 0
    content = (folder / "networks" / "plain_cnn-W4A4-int8.tflite").read_bytes()
    assert row["bytes"] == len(content) < base["bytes"]
    assert row["gzip_bytes"] == tfl.export.gzip_bytes(content)


def test_the_table_shows_what_is_written(measured):
    shown, result, _ = measured
    lines = [line for line in shown.splitlines() if line.startswith("│ plain_cnn")]
    cells = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]
    files = result["results"]["plain_cnn"]["files"]
    assert [row[1] for row in cells] == [*PEERS, OURS]
    for _, label, size, gzip, latency, *_, accuracy in cells:
        row = files[label]
        assert float(size) == pytest.approx(row["size"], abs=6e-4)
        assert float(gzip) == pytest.approx(row["gzip"], abs=6e-4)
        assert float(latency) == pytest.approx(row["latency to float32"], abs=6e-3)
        assert accuracy == f"{100 * row['accuracy']:.2f} %"


def test_says_with_what_it_was_measured(measured):
    _, result, _ = measured
    settings = result["settings"]
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert settings["network"] == ["plain_cnn"]
    assert settings["bits"] == ["W4A4"]
    assert not {"output", "folder"} & set(settings)
    assert result["versions"] == environment()["versions"]
    assert "machine" in result


def test_the_networks_are_kept_for_a_second_call(measured):
    *_, folder = measured
    assert {path.name for path in (folder / "networks").iterdir()} == {
        *("plain_cnn.weights.h5", "plain_cnn-W4A4.h5"),
        "plain_cnn-W4A4-int8.tflite",
    }
    assert sorted(p.name for p in folder.iterdir()) == ["deployment.json", "networks"]


def test_the_committed_table_has_the_latencies_of_each_machine(measured, tmp_path):
    _, result, _ = measured
    for name, machine, factor in (
        ("deployment.json", ["avx2", "fma"], 3.0),
        ("deployment-vnni.json", ["avx2", "avx512_vnni"], 1.0),
    ):
        other = json.loads(json.dumps(result))
        other["machine"]["instructions"] = machine
        for row in other["results"]["plain_cnn"]["files"].values():
            row["latency to float32"] *= factor
            row["size"] *= factor
        (tmp_path / name).write_text(json.dumps(other))
    shown = deployment_report.tables(tmp_path)["deployment"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    assert cells[0] == [
        *("network, file", "size", "gzip", "latency, without", "latency, with VNNI"),
        *("= trained, %", "accuracy, %"),
    ]
    files = result["results"]["plain_cnn"]["files"]
    assert [row[0] for row in cells[2:]] == [f"plain_cnn, {f}" for f in (*PEERS, OURS)]
    for line, name in zip(cells[2:], (*PEERS, OURS), strict=True):
        row = files[name]
        figures = (row["size"], row["gzip"])
        assert line[1:3] == [f"{figure:.3f}" for figure in figures]
        latency = row["latency to float32"]
        assert line[3:5] == [f"{3 * latency:.2f}", f"{latency:.2f}"]
        agrees = f"{100 * row['trained_agrees'] / 32:.2f}" if name == OURS else "—"
        assert line[5] == agrees
        assert line[6] == f"{100 * row['accuracy']:.2f}"


# What is committed


@pytest.fixture(scope="module", params=deployment_report.FILES)
def committed(request):
    """The committed figures, and the section that quotes them."""
    text = (programs.ROOT / "benchmarks" / "README.md").read_text()
    section = text[text.index("## `deployment`") :]
    data = json.loads((RESULTS / request.param).read_text())
    return data, section[: section.index("\n## ")]


def test_what_the_readme_says_of_the_proofs_is_in_the_committed_json(committed):
    data, section = committed
    words = " ".join(section.split())
    found = re.search(
        r"equal to its twin in (\d+) to (\d+) million codes and on all ([\d,]+) test",
        words,
    )
    assert found, words
    ours = [
        row
        for result in data["results"].values()
        for row in result["files"].values()
        if "codes" in row
    ]
    assert all(row["verified"] and not row["mismatches"] for row in ours)
    assert not any(row["end_to_end_mismatches"] for row in ours)
    codes = [round(row["codes"] / 1e6) for row in ours]
    assert (min(codes), max(codes)) == (int(found[1]), int(found[2]))
    images = int(found[3].replace(",", ""))
    assert {row["test_images"] for row in ours} == {images}
    assert {row["twin_agrees"] for row in ours} == {images}


@pytest.mark.parametrize("committed", deployment_report.FILES[-1:], indirect=True)
def test_what_the_readme_says_of_the_time_is_in_the_committed_json(committed):
    data, section = committed
    words = " ".join(section.split())
    found = re.search(
        r"residual networks take ([\d.]+) to ([\d.]+) of float32's .* ours take "
        r"([\d.]+) to ([\d.]+) of its time on the plain network, "
        r"([\d.]+) to ([\d.]+) on the residual ones and ([\d.]+) to ([\d.]+) on Mob",
        words,
    )
    assert found, words

    def extremes(networks, other):
        ratios = [
            row[f"latency to {other}"]
            for network in networks
            for name, row in data["results"][network]["files"].items()
            if name.startswith("W") and name.endswith("int8")
        ]
        return [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]

    plain, residual, mobile = (
        ["plain_cnn"],
        ["preact_resnet8", "preact_resnet20"],
        ["mobilenet_v2"],
    )
    assert list(found.groups()) == [
        *extremes(plain + residual, "float32"),
        *extremes(plain, "post-training int8"),
        *extremes(residual, "post-training int8"),
        *extremes(mobile, "post-training int8"),
    ]


def test_packed_files_of_tiny_networks_are_small_and_equal():
    networks = json.loads((RESULTS / "tiny.json").read_text())["networks"]
    assert list(networks) == ["ResNet-8", "DS-CNN", "MobileNetV1 0.25"]
    for found in networks.values():
        assert list(found["bits"]) == ["W8A8", "W4A4", "W3A3", "W2A2"]
        sizes = [found["float"]]
        for row in found["bits"].values():
            assert row["equal"]
            assert row["codes"] > 100_000
            assert row["mismatches"] == 0
            sizes.append(row["bytes"]["packed"])
        assert sizes == sorted(sizes, reverse=True)
    assert networks["ResNet-8"]["bits"]["W2A2"]["bytes"]["packed"] <= 40_000
