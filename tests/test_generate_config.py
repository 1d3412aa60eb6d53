"""Mistakes in a Generate section are told by field."""

import dataclasses

import pytest

from mtl_jax.errors import UserError
from mtl_jax.generate_config import GenerateConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bean"}, r"Generate.method: unknown name 'bean'. Did you mean 'beam'\?"),
        ({"method": "beam", "length_penalty": "hf"}, r"length_penalty.*Known: t5x, hugging_face"),
        ({"method": "beam", "early_stopping": "full"}, r"Generate.early_stopping: unknown"),
        ({"top_k": 5}, r"Generate.top_k belongs to the method 'sample'.*'greedy'"),
        ({"seed": 1}, r"Generate.seed belongs to the method 'sample'"),
        ({"method": "sample", "num_beams": 2}, r"Generate.num_beams belongs to the method 'beam'"),
        ({"method": "beam", "top_p": 0.5}, r"Generate.top_p belongs to the method 'sample'"),
        ({"method": "beam", "early_stopping": "never"}, r"belongs to .* = 'hugging_face'"),
        ({"num_return": 2}, r"Generate.num_return = 2, but greedy decoding has one result"),
        ({"method": "beam", "num_return": 5}, r"num_return = 5 is more than .*num_beams = 4"),
        ({"max_length": 0}, r"Generate.max_length must be at least 1, got 0"),
        ({"min_length": -1}, r"Generate.min_length must be at least 0"),
        ({"max_length": 3, "min_length": 4}, r"min_length = 4 is more than .*max_length = 3"),
        ({"method": "sample", "top_k": -1}, r"Generate.top_k must be at least 0"),
        ({"method": "sample", "temperature": 0.0}, r"temperature must be positive.*'greedy'"),
        ({"method": "sample", "temperature": float("nan")}, r"temperature must be positive"),
        ({"method": "sample", "top_p": 1.5}, r"Generate.top_p must be in \(0, 1\]"),
        ({"method": "sample", "top_p": 0.0}, r"Generate.top_p must be in \(0, 1\]"),
        ({"method": "sample", "seed": -1}, r"Generate.seed must be at least 0"),
        ({"method": "sample", "seed": 2**32}, r"Generate.seed must be below"),
        ({"method": "beam", "length_alpha": -0.1}, r"length_alpha must not be negative for 't5x'"),
        ({"method": "beam", "length_alpha": float("inf")}, r"length_alpha must be a number"),
        ({"stop": "ab"}, r"Generate.stop must be a list of texts"),
        ({"stop": ["a", ""]}, r"Generate.stop must be a list of texts, none of them empty"),
    ],
)
def test_a_mistake_names_its_field(changes, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(**changes)


def test_the_exponent_is_that_of_the_penalty_unless_given():
    t5x = GenerateConfig(method="beam")
    hugging_face = dataclasses.replace(t5x, length_penalty="hugging_face")
    assert (t5x.alpha, hugging_face.alpha) == (0.6, 1.0)
    assert dataclasses.replace(hugging_face, length_alpha=-2.0).alpha == -2.0


def test_a_config_can_be_static():
    assert hash(GenerateConfig(stop=["a"])) == hash(GenerateConfig(stop=("a",)))
    assert GenerateConfig(method="sample", num_return=3).width == 3
    assert GenerateConfig(method="beam", num_return=3).width == 4
