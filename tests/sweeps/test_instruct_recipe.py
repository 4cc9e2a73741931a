"""The recipe of an instruction-tuned model: what it fixes of the paper, and what it says where its model is not at hand."""

import pytest

from mlx_forget.methods import TERM_REPLAY_KL, TERM_REPLAY_NTP
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.sweeps.grid import read_recipe


def test_the_recipe_is_the_papers_experiment(monkeypatch):
    monkeypatch.delenv("FORGET_SCALE")
    configs = read_recipe(find_recipe("replay-instruct")).configs({})
    assert [config.method for config in configs] == ["plain", "ntp-replay", "ntp-replay", "kl-replay", "kl-replay"]
    assert [config.replay_data for config in configs[1:]] == ["online", "pretrain"] * 2
    for config in configs:
        assert config.model == "meta-llama/Llama-3.2-1B-Instruct"
        assert (config.batch_size, config.max_seq_length, config.learning_rate, config.beta2) == (128, 512, 1e-5, 0.997)
        assert (config.weight_decay, config.max_grad_norm, config.stop_epochs, config.mask_prompt) == (0.02, 0, 5, True)
        # 10M tokens of warm-up, to the step.
        assert round(config.warmup * config.iters) == round(10e6 / (128 * 512))
        method = config.method_spec()
        assert method.coefficients[TERM_REPLAY_NTP] + method.coefficients[TERM_REPLAY_KL] == (config.method != "plain")


def test_without_the_model_and_a_network_it_is_one_sentence(monkeypatch, run_forget, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("FORGET_SCALE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run_forget("sweep", "replay-instruct", "--dry-run")
    assert code == 2
    assert "meta-llama/Llama-3.2-1B-Instruct is no folder here and not in the Hub's cache" in " ".join(err.split())
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
