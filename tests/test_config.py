"""Layers of keys and values: what stands for a default, and which types a value may have."""

import pytest

from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_a_key_that_may_be_left_out_takes_none(word):
    assert from_layers(TrainConfig, {"pretrain": word, "p": "0"}).pretrain is None


def test_all_is_everything_only_where_there_is_a_whole():
    config = from_layers(TrainConfig, {"target_tokens": "all", "lora_num_layers": "ALL", "pretrain": "all"})
    assert (config.target_tokens, config.lora_num_layers, config.pretrain) == (None, None, "all")


@pytest.mark.parametrize("key", ["learning_rate", "iters", "max_grad_norm"])
def test_a_truth_value_is_no_number(key):
    with pytest.raises(UserError, match=f"{key} must be of type"):
        from_layers(TrainConfig, {key: True})
