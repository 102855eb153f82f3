"""The sensitivity profiles that ship fit the models and the files of this version."""

from pathlib import Path

import pytest

from impq_edge.conversion.layout import header_bytes
from impq_edge.conversion.tokenizer import read_tokenizer
from impq_edge.data import data_path
from impq_edge.model.spec import read_model
from impq_edge.stages import allocate, load_profile

SHIPPED = sorted(path.stem for path in data_path("profiles").glob("*.json"))


def test_some_ship() -> None:
    assert SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_of_the_demo_model_as_it_is(name: str, demo: Path) -> None:
    profile, spec = load_profile(name), read_model(demo)
    assert profile.model == spec
    hyper = spec.hyperparameters
    assert profile.header_bytes == header_bytes(spec, read_tokenizer(demo, hyper.vocabulary, hyper.architecture))
    assert profile.estimate().phi.shape == (spec.n_blocks,)
    assert allocate(profile, device="raspberry-pi-5", average_bits=3).average_bits == 3
