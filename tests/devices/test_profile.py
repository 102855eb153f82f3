"""Device profiles: the shipped ones are whole and sourced, a user's is checked, and a machine is recognised."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from impq_edge.data import data_path
from impq_edge.devices.profile import DeviceProfile, Identity, device_names, is_this_machine, load_device
from impq_edge.errors import DeviceError
from impq_edge.records import load_toml

MINE: dict[str, str] = {
    "name": '"mine"',
    "title": '"Mine"',
    "memory_bytes": '"4 GiB"',
    "system_reserve_bytes": "536870912",
    "cores": "4",
    "threads": "4",
    "isa": '"aarch64+dotprod"',
    "memory_bandwidth_bytes_per_s": "17e9",
}


def write(path: Path, **changes: str | None) -> str:
    values = {key: value for key, value in {**MINE, **changes}.items() if value is not None}
    file = path / "mine.toml"
    file.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return str(file)


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_device_loads_and_says_where_each_number_is_from(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    numbers = {key for key, value in load_toml(data_path("devices", f"{name}.toml")).items() if key.endswith(
        ("_bytes", "_per_s", "cores"))} | {"memory_bytes", "memory_bandwidth_bytes_per_s"}  # fmt: skip
    assert numbers <= device.sources.keys()
    assert all(len(source) > 10 for source in device.sources.values())


def test_the_devices_that_were_promised_ship() -> None:
    assert {"raspberry-pi-5", "raspberry-pi-zero-2w", "jetson-orin-nano-8gb", "android-8gb", "laptop-16gb"} <= set(
        device_names()
    )


def test_sizes_may_be_text_or_bytes_and_defaults_hold(tmp_path: Path) -> None:
    device = load_device(write(tmp_path))
    assert (device.memory_bytes, device.system_reserve_bytes) == (4 * 2**30, 2**29)
    assert (device.context_tokens, device.kv_type, device.batch_tokens) == (4096, "f16", 512)
    assert (device.architecture, device.isa_features) == ("aarch64", {"dotprod"})


def test_a_profile_survives_being_saved(tmp_path: Path) -> None:
    device = load_device("raspberry-pi-5")
    device.save(tmp_path / "device.json")
    assert DeviceProfile.load(tmp_path / "device.json") == device


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"memory_bytes": '"4 GB"'}, "KiB, MiB or GiB"),
        ({"memory_bytes": '"-4 GiB"'}, "KiB, MiB or GiB"),
        ({"memory_bytes": '"9999999999999 GiB"'}, "KiB, MiB or GiB"),
        ({"memory_bytes": '"999999999 GiB"'}, "less than"),
        ({"memory_bytes": "-1"}, "greater than"),
        ({"memory_bytes": "4.5"}, "integer"),
        ({"memory_bytes": "true"}, "integer"),
        ({"memory_bytes": None}, "memory_bytes"),
        ({"memory_bytes": "10000000"}, "leave nothing"),
        ({"memory_bandwidth_bytes_per_s": "nan"}, "memory_bandwidth_bytes_per_s"),
        ({"memory_bandwidth_bytes_per_s": "inf"}, "memory_bandwidth_bytes_per_s"),
        ({"memory_bandwidth_bytes_per_s": "0"}, "greater than"),
        ({"cores": '"4"'}, "integer"),
        ({"cores": "2"}, "threads 4 exceed cores 2"),
        ({"isa": '"riscv64"'}, "isa 'riscv64'"),
        ({"isa": '"aarch64+avx2"'}, "aarch64+avx2"),
        ({"name": '"../up"'}, "name"),
        ({"kv_type": '"q3_k"'}, "kv_type"),
        ({"kv_type": '"iq4_nl"', "flash_attention": "false"}, "needs flash_attention"),
        ({"gpu_layers": "5"}, "gpu_layers 5 needs gpu"),
        ({"gpu_layers": "5", "gpu": '"G"'}, "needs gpu, which one it is, and gpu_reserve_bytes"),
        ({"gpu_layers": "-1"}, "gpu_layers"),
        ({"gpu_memory_bytes": '"4 GiB"'}, "gpu_memory_bytes and gpu_reserve_bytes need gpu"),
        ({"gpu": '"G"', "gpu_memory_bytes": '"1 GiB"', "gpu_reserve_bytes": '"1 GiB"'}, "leave nothing of gpu_memory"),
        ({"kv_type": '"q8_0"', "flash_attention": "false"}, "needs flash_attention"),
        ({"ubatch_tokens": "1024"}, "ubatch_tokens exceed"),
        ({"context_tokens": "0"}, "context_tokens"),
        ({"mmap": "1"}, "mmap"),
        ({"memory": '"4 GiB"'}, "memory"),
        ({"sources": '{ ram = "somewhere" }'}, "sources names no field: ram"),
        ({"identify": '{ colour = "green" }'}, "identify.colour"),
        ({"cores": "= 4"}, "not TOML"),
    ],
)
def test_a_hostile_file_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, str | None], complaint: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        load_device(write(tmp_path, **changes))
    message = str(caught.value)
    assert complaint in message and "mine.toml" in message and "\n" not in message


def test_a_gpu_shares_memory_unless_it_has_its_own(tmp_path: Path) -> None:
    gpu = {"gpu": '"A GPU"', "gpu_layers": "999", "gpu_reserve_bytes": '"256 MiB"'}
    assert load_device(write(tmp_path, **gpu)).gpu_memory_bytes is None
    assert load_device(write(tmp_path, **gpu, gpu_memory_bytes='"6 GiB"')).gpu_memory_bytes == 6 * 2**30
    assert load_device("jetson-orin-nano-8gb").gpu_memory_bytes is None
    assert load_device("laptop-16gb-rtx4050").gpu_memory_bytes == 6 * 2**30


def test_a_name_that_is_none_is_told_the_nearest() -> None:
    with pytest.raises(DeviceError, match="use one of raspberry-pi-5, "):
        load_device("rasberry-pi-5")
    with pytest.raises(DeviceError, match=r"use one of android-8gb, .*rock-5b-8gb"):
        load_device("???")


def test_a_path_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="does not exist"):
        load_device(str(tmp_path / "none.toml"))
    with pytest.raises(DeviceError, match="is a directory; pass a file"):
        load_device(f"{tmp_path}/")


def machine(root: Path, memory_kb: int, model: str | None = None, cpu: str | None = None) -> Path:
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {memory_kb} kB\nMemFree: 1 kB\n")
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {cpu}\n" if cpu else "processor\t: 0\n")
    if model:
        (root / "proc/device-tree/model").write_bytes(model.encode() + b"\0")
    return root


@pytest.mark.parametrize(
    ("name", "memory_kb", "model", "expected"),
    [
        ("raspberry-pi-5", 8243456, "Raspberry Pi 5 Model B Rev 1.0", True),
        ("raspberry-pi-5-4gb", 8243456, "Raspberry Pi 5 Model B Rev 1.0", False),
        ("raspberry-pi-5-4gb", 4065536, "Raspberry Pi 5 Model B Rev 1.1", True),
        ("raspberry-pi-5", 8243456, "Raspberry Pi 4 Model B Rev 1.4", False),
        ("raspberry-pi-5", 8243456, None, False),
        ("laptop-8gb", 8000000, None, False),  # a class of machines identifies none
    ],
)
def test_a_board_is_recognised_by_its_model_and_memory(
    tmp_path: Path, name: str, memory_kb: int, model: str | None, expected: bool
) -> None:
    assert is_this_machine(load_device(name), machine(tmp_path, memory_kb, model)) is expected


def test_a_processor_is_recognised_and_every_text_must_occur(tmp_path: Path) -> None:
    device = load_device("mini-pc-n100-8gb")
    root = machine(tmp_path, 7_800_000, cpu="Intel(R) N100")
    assert is_this_machine(device, root)
    both: Any = dataclasses.replace(device, identify=Identity(board="Beelink", cpu="n100"))
    assert not is_this_machine(both, root)
    assert not is_this_machine(dataclasses.replace(device, identify=Identity()), root)
    assert not is_this_machine(device, tmp_path / "no-proc-here")
