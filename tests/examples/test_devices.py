import json

import pytest

from examples import devices
from tf_lowbit.compat import tf

WORKER = {"type": "worker", "index": 0}
CPUS = 4  # tests/conftest.py
LOCAL = tf.distribute.get_strategy()


def config(*workers, **others):
    cluster = {"worker": list(workers)} if workers else {}
    return json.dumps({"cluster": cluster, "task": WORKER, **others})


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


@pytest.fixture
def made(monkeypatch):
    """What strategies are made, instead of making them."""
    calls = []

    def record(name):
        def make(*arguments, **options):
            calls.append((name, arguments, options))
            return name

        return make

    for name in ("MirroredStrategy", "MultiWorkerMirroredStrategy"):
        monkeypatch.setattr(tf.distribute, name, record(name))
    return calls


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes TensorFlow see so many GPUs."""
    listed = {
        name: getattr(tf.config, name) for name in dir(tf.config) if "list_" in name
    }

    def pretend(count):
        found = [
            tf.config.LogicalDevice(f"/device:GPU:{index}", "GPU")
            for index in range(count)
        ]
        for name in ("list_logical_devices", "list_physical_devices"):
            monkeypatch.setattr(
                tf.config,
                name,
                lambda kind, real=listed[name]: found if kind == "GPU" else real(kind),
            )

    return pretend


@pytest.mark.parametrize("name", ["one", "auto"])
def test_one_device_is_tensorflows_own_strategy(name, gpus):
    gpus(0)
    found = devices.strategy(name)
    assert found is LOCAL
    assert found.num_replicas_in_sync == 1


def test_auto_is_the_default(gpus, made):
    gpus(2)
    assert devices.strategy() == devices.strategy("auto")
    assert len(made) == 2


def test_one_stays_one_with_several_gpus_and_workers(gpus, made, monkeypatch):
    gpus(2)
    monkeypatch.setenv("TF_CONFIG", config("a:1", "b:2"))
    assert devices.strategy("one") is LOCAL
    assert made == []


def test_mirrored_takes_all_logical_cpus_without_gpus(gpus):
    gpus(0)
    found = devices.strategy("mirrored")
    assert isinstance(found, tf.distribute.MirroredStrategy)
    assert found.num_replicas_in_sync == CPUS
    assert [name[-5:] for name in found.extended.worker_devices] == [
        f"CPU:{index}" for index in range(CPUS)
    ]


@pytest.mark.parametrize("name", ["auto", "mirrored"])
def test_several_gpus_are_all_taken(gpus, made, name):
    gpus(3)
    assert devices.strategy(name) == "MirroredStrategy"
    ((_, (taken,), options),) = made
    assert taken == [f"/device:GPU:{index}" for index in range(3)]
    assert options == {}


def test_auto_takes_one_gpu_as_it_is(gpus, made):
    gpus(1)
    assert devices.strategy("auto") is LOCAL
    assert made == []


def test_mirrored_needs_two_devices(gpus):
    gpus(1)
    with pytest.raises(ValueError, match=r"two GPUs, or --logical_cpus=2.*GPU:0'\]$"):
        devices.strategy("mirrored")


@pytest.mark.parametrize("name", ["auto", "multi_worker"])
@pytest.mark.parametrize(("count", "kind"), [(0, "RING"), (2, "AUTO")])
def test_several_workers(gpus, made, monkeypatch, name, count, kind):
    """Over the ring on CPUs, where NCCL is not; several GPUs do not come first."""
    gpus(count)
    monkeypatch.setenv("TF_CONFIG", config("a:1", "b:2"))
    assert devices.strategy(name) == "MultiWorkerMirroredStrategy"
    ((_, arguments, options),) = made
    assert arguments == ()
    implementation = options.pop("communication_options").implementation
    assert implementation.name == kind
    assert options == {}


@pytest.mark.parametrize(
    "text", [config("a:1"), config(), "{}", '{"task": {"type": "worker"}}']
)
def test_auto_without_several_workers_is_local(gpus, made, monkeypatch, text):
    gpus(0)
    monkeypatch.setenv("TF_CONFIG", text)
    assert devices.strategy("auto") is LOCAL
    assert made == []


def test_one_worker_is_a_cluster_where_it_is_asked_for(made, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config("a:1"))
    assert devices.strategy("multi_worker") == "MultiWorkerMirroredStrategy"
    assert len(made) == 1


@pytest.mark.parametrize("text", [None, "{}", config()])
def test_multi_worker_needs_to_be_told_the_workers(monkeypatch, text):
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="needs the environment variable") as caught:
        devices.strategy("multi_worker")
    message = str(caught.value)
    assert message.endswith(f"Received: TF_CONFIG={text!r}")
    # The example in it is one that works.
    example = message[message.index("{") : message.index(". Received")]
    monkeypatch.setenv("TF_CONFIG", example)
    assert devices._workers() == ["host1:12345", "host2:12345"]


@pytest.mark.parametrize("name", ["auto", "multi_worker"])
@pytest.mark.parametrize("text", ["{", "no json", "[]", '"text"', '{"cluster": []}'])
def test_a_malformed_cluster_is_refused(monkeypatch, name, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG must be a JSON object") as caught:
        devices.strategy(name)
    assert str(caught.value).endswith(f"Received: {text!r}")


@pytest.mark.parametrize("name", ["", "two", "Mirrored", None])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"strategy must be one of \('auto', .*") as it:
        devices.strategy(name)
    assert str(it.value).endswith(f"Received: {name!r}")


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("name", devices.STRATEGIES)
def test_there_must_be_a_cpu(name, count):
    with pytest.raises(
        ValueError, match=f"logical_cpus must be >= 1. Received: {count}"
    ):
        devices.strategy(name, count)


def test_the_cpu_is_split_as_asked(gpus, monkeypatch):
    gpus(0)
    split = []
    monkeypatch.setattr(
        tf.config,
        "set_logical_device_configuration",
        lambda *arguments: split.append(arguments),
    )
    devices.strategy("mirrored", 3)
    devices.strategy("one", 1)
    ((device, parts),) = split
    assert device.device_type == "CPU"
    assert len(parts) == 3
