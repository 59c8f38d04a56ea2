"""Shapes that stand in annotations are checked while tests run (and only then)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from dpsynth.networks import column_log_likelihood
from dpsynth.privacy.layers import embedding_squared_norms, squared_norms


def test_inputs_and_output_gradients_of_a_layer_belong_to_the_same_records():
    a, b = torch.ones(2, 5, 3, 4), torch.ones(2, 5, 3, 6)
    assert squared_norms(a, b).shape == (2, 5)
    with pytest.raises(TypeCheckError):
        squared_norms(a, b[:, :4])
    with pytest.raises(TypeCheckError):
        squared_norms(a[0], b[0])


def test_codes_and_output_gradients_of_a_table_belong_to_the_same_draws():
    codes, b = torch.zeros(2, 5, 3, dtype=torch.long), torch.ones(2, 5, 3, 6)
    assert embedding_squared_norms(codes, b).shape == (2, 5)
    for left, right in ((codes[:, :, :2], b), (codes.float(), b), (codes, b[..., 0])):
        with pytest.raises(TypeCheckError):
            embedding_squared_norms(left, right)


def test_level_numbers_are_integers():
    logits = torch.zeros(2, 5, 3)
    codes = torch.zeros(2, 5, 1, dtype=torch.long)
    assert column_log_likelihood(logits, codes, [3]).shape == (2, 5, 1)
    with pytest.raises(TypeCheckError):
        column_log_likelihood(logits, codes.float(), [3])
