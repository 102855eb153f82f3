import pytest
import torch

from impq_edge.backends import NAMES, describe, load_backend
from impq_edge.errors import BackendError
from impq_edge.ggml.encode import decode, encode
from impq_edge.ggml.types import TensorType


@pytest.mark.parametrize(
    ("columns", "bits", "kind"), [(512, 2, "q2_k"), (512, 4, "q4_k"), (576, 2, "q4_0"), (576, 4, "q5_0")]
)
def test_weights_are_those_of_the_file(columns: int, bits: int, kind: str) -> None:
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(0))
    stored = load_backend("kquant").quantise(weight, bits)
    expected = decode(encode(weight.numpy(), TensorType(kind)), TensorType(kind))
    assert torch.equal(stored.weight, torch.from_numpy(expected))
    assert stored.bits_per_weight == TensorType(kind).bits_per_weight


def test_unknown_backend_and_setting() -> None:
    with pytest.raises(BackendError, match="'awq' is unknown; choose one of kquant, hqq"):
        load_backend("awq")
    with pytest.raises(BackendError, match="does not take these settings"):
        load_backend("hqq", colour="red")


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_can_tell_what_quantised(name: str) -> None:
    told = describe(name, load_backend(name))
    assert told["name"] == name and str(told["library"]).split()[1][0].isdigit()
