"""Runs on checkpoints of other tools, from the command line to files that transformers and mlx-lm load."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_forget.backends import available_backends
from mlx_forget.checkpoint import seal
from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.durable_files import SEAL
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.pipeline.catalog import resolve_store
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.pretrained import _refusal, find_pretrained, read_pretrained
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute
from mlx_forget.training.watch import Watch
from tests.small_checkpoints import TEMPLATE, WORDS, transformers_logits, vocab_size, write_checkpoint, write_tokenizer

pytest.importorskip("transformers")

BACKENDS = available_backends()
STEPS = ("--iters", "6", "--learning-rate", "1e-3", "--batch-size", "4", "--max-seq-length", "32", "--eval-rows", "8")


def write_texts(path, num=120, seed=0, words=60):
    generator, choices = np.random.default_rng(seed), WORDS.split()
    lines = [json.dumps({"text": " ".join(generator.choice(choices, words))}) for _ in range(num)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_chats(path, num=60):
    generator, choices = np.random.default_rng(1), WORDS.split()
    system = {"role": "system", "content": "sing"}
    turns = [
        [{"role": role, "content": " ".join(generator.choice(choices, 4))} for role in ("user", "assistant") * 2]
        for _ in range(num)
    ]
    path.write_text("\n".join(json.dumps({"messages": [system, *one]}) for one in turns), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two checkpoints and data."""
    folder = tmp_path_factory.mktemp("place")
    write_checkpoint(folder / "llama", "llama")
    write_checkpoint(folder / "qwen3", "qwen3")
    write_texts(folder / "notes.jsonl")
    write_texts(folder / "old.jsonl", seed=9)
    write_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture
def forget(run_forget, place, monkeypatch):
    monkeypatch.chdir(place)
    return run_forget


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finetune_is_loaded_by_transformers_and_mlx_lm_and_audited(forget, place, backend):
    run = place / f"run-{backend}"
    data = ("--target", "notes.jsonl", "--pretrain", "old.jsonl", "--p", "25%", "--backend", backend)
    code, out, err = forget("train", "--model", "llama", *data, *STEPS, "--output", run, "--json")
    assert code == 0, err
    assert "rows start with '<|bos|>'" in err
    record = json.loads(out)
    assert record["num_params"] == read_pretrained(place / "llama").num_params
    assert record["p"]["rows"] == 0.25
    assert record["losses"]["end"]["target_val"] < record["losses"]["start"]["target_val"]
    last = run / "checkpoints" / "last"
    tokens = np.random.default_rng(0).integers(4, vocab_size(), (2, 17)).astype(np.int32)
    logits = transformers_logits(last, tokens)
    assert np.abs(logits - transformers_logits(place / "llama", tokens)).max() > 1e-3
    if "mlx" in BACKENDS:
        import mlx.core as mx
        from mlx_lm import load

        # The config that mlx-lm reads must have the rotary base where it looks for it.
        model, tokenizer = load(str(last))
        np.testing.assert_allclose(np.array(model(mx.array(tokens)).astype(mx.float32)), logits, atol=1e-4)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "sing"}], tokenize=False).startswith(
            "<|bos|><|im_start|>"
        )
    code, out, err = forget("audit", "auto", run, "--data", "old=old.jsonl", "--backend", backend, "--json")
    assert code == 0, err
    audit = json.loads(out)
    assert audit["base"]["num_params"] == record["num_params"]
    assert audit["texts"][0]["losses"]["forgetting"]["value"] < 0
    # A finetune of the finetune knows its shape and has no other base than the run.
    code, out, err = forget("train", "--init", run, *data, *STEPS, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["model"]["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_goes_on_to_the_same_numbers_on_either_backend(place, backend, monkeypatch):
    monkeypatch.chdir(place)

    def run(name, own, watch=None):
        values = {"model": "qwen3", "target": "notes.jsonl", "pretrain": "old.jsonl", "p": "10%", "iters": 6, "batch_size": 4}
        values |= {"max_seq_length": 32, "eval_rows": 8, "learning_rate": 1e-3, "seed": 4, "backend": own}
        plan = plan_run(from_layers(TrainConfig, values), folder=place / f"{name}-{backend}", watch=watch)
        return execute(plan, watch=watch)["losses"]["end"]

    whole = run("whole", backend)
    for other in BACKENDS:
        steps = iter([None] * 3)
        with pytest.raises(Interrupted, match="at step 4"):
            run(f"to-{other}", backend, Watch(interrupted=lambda steps=steps: next(steps, 2)))
        after = run(f"to-{other}", other)
        assert after["step"] == 6
        for name in ("target_train", "target_val", "pretrain_val"):
            assert after[name] == pytest.approx(whole[name], abs=0 if other == backend else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_self_replay_with_a_kl_term(forget, place, backend):
    arguments = ("--model", "qwen3", "--target", "chats.jsonl", "--rows", "padded", "--pretrain", "none", "--method", "kl-replay")
    code, out, err = forget("train", *arguments, *STEPS, "--backend", backend, "--output", place / f"kl-{backend}", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["data"]["replay:self"]["tokens_seen"] == 6 * 32
    assert "sampling" in err


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_on_a_checkpoint_are_trained_fused_and_audited(forget, place, backend):
    run, fused = place / f"lora-{backend}", place / f"fused-{backend}"
    arguments = ("--model", "llama", "--target", "notes.jsonl", "--pretrain", "old.jsonl", "--p", "25%", "--fine-tune-type", "lora")
    code, out, err = forget("train", *arguments, *STEPS, "--backend", backend, "--output", run, "--json")
    assert code == 0, err
    record = json.loads(out)
    # Rank 8 on queries, keys, values and outputs of two blocks.
    assert record["num_trainable_params"] == 2 * 8 * (4 * 32 + 32 + 16 + 16 + 32)
    assert record["losses"]["end"]["target_val"] < record["losses"]["start"]["target_val"]
    assert not (run / "checkpoints" / "last" / "model.safetensors").exists()
    assert forget("fuse", run, "-o", fused)[0] == 0
    code, out, err = forget("audit", "llama", fused, "--data", "notes=notes.jsonl", "--backend", backend, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert forget("audit", "auto", run, "--data", "notes=notes.jsonl", "--backend", backend, "--json")[0] == 0
    moved = [tensor["name"] for tensor in found["weights"]["tensors"] if tensor["distance"] > 0]
    assert len(moved) == 8
    assert all("self_attn" in name for name in moved)
    tokens = np.random.default_rng(0).integers(4, vocab_size(), (1, 9)).astype(np.int32)
    assert np.isfinite(transformers_logits(fused, tokens)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_replay_of_a_checkpoint_is_a_store(forget, place, backend):
    code, _, err = forget(
        "replay", "llama", "-o", place / f"rep-{backend}", "--num-tokens", "1K", "--length", "32", "--backend", backend
    )
    assert code == 0, err
    store = open_store(place / f"rep-{backend}")
    assert store.split("train").num_tokens == 1024
    assert store.bos_id == 0
    assert store.provenance["model"]["run_id"].startswith("llama-")


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
def test_both_backends_sample_the_same_rows(forget, place):
    rows = [open_store(place / f"rep-{backend}").split("train").tokens[0] for backend in BACKENDS]
    np.testing.assert_array_equal(*rows)


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_document_rows_are_padded_where_there_is_no_document_mask_and_that_is_said(forget, place):
    arguments = ("--model", "llama", "--target", "notes.jsonl", "--pretrain", "none", "--p", "0", "--rows", "documents", *STEPS)
    code, _, err = forget("train", *arguments, "--backend", "mlx", "--dry-run", "--json")
    assert code == 0
    assert "takes no document mask on this backend: rows are padded" in err


def test_long_conversations_are_counted(forget, place):
    for rows, what in (("padded", "go on in further rows"), ("truncated", "end with their first row")):
        arguments = ("--model", "llama", "--target", "chats.jsonl", "--pretrain", "none", "--p", "0", "--rows", rows, *STEPS)
        code, _, err = forget("train", *arguments, "--dry-run")
        assert code == 0, err
        assert f"documents are longer than a row of 32 tokens and {what}" in " ".join(err.split())
    arguments = ("--model", "llama", "--target", "chats.jsonl", "--pretrain", "none", "--p", "0", "--rows", "whole", *STEPS)
    code, _, err = forget("train", *arguments, "--dry-run")
    assert code == 2
    assert "smaller than one row" in err


def test_a_name_of_the_model_is_not_part_of_the_runs_name(forget, place):
    shutil.copytree(place / "llama", place / "moved", dirs_exist_ok=True)
    ids = []
    for arguments in (("--model", "llama"), ("--model", "moved")):
        code, out, err = forget(
            "train", *arguments, "--target", "notes.jsonl", "--pretrain", "none", "--p", "0", "--dry-run", "--json", *STEPS
        )
        assert code == 0, err
        ids.append(json.loads(out)["run_id"])
    assert len(set(ids)) == 1


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs PyTorch")
def test_a_checkpoint_of_another_tool_is_not_sharded_and_the_plan_says_so(forget):
    options = ("--backend", "cuda", "--shard", "--target", "notes.jsonl", "--pretrain", "none", "--p", "0", "--dry-run")
    code, _, err = forget("train", "--model", "llama", *options, *STEPS)
    assert code == 2
    assert "--shard knows the models of the ladder" in " ".join(err.split())


def test_other_special_tokens_than_the_models_are_warned_of(forget, place):
    shutil.copytree(place / "llama", place / "chatty", dirs_exist_ok=True)
    write_tokenizer(place / "chatty", eos="<|im_end|>")
    if not (place / "store").exists():
        assert forget("prepare", "notes.jsonl", "--tokenizer", place / "chatty", "-o", place / "store")[0] == 0
    code, _, err = forget("train", "--model", "llama", "--target", "store", "--pretrain", "none", "--p", "0", "--dry-run", *STEPS)
    assert code == 0, err
    assert "its documents end with '<|im_end|>', the model's with '<|eos|>'" in " ".join(err.split())


def test_only_answers_of_every_turn_count_in_the_store(place):
    store = resolve_store(str(place / "chats.jsonl"), place / "llama" / "tokenizer.json")
    vocabulary = load_vocabulary(place / "llama" / "tokenizer.json")
    split = store.split("train")
    start, _ = split.documents(0)
    tokens, mask = split.tokens[0][: start[1]], split.loss_mask(0)[: start[1]]
    learnt = "".join(vocabulary.piece(int(index)) for index in tokens[mask == 1])
    messages = [json.loads(line)["messages"] for line in (place / "chats.jsonl").read_text().splitlines()]
    answers = {"".join(m["content"].replace(" ", "Ġ") + "<|im_end|>" for m in one if m["role"] == "assistant") for one in messages}
    assert learnt in answers


WRONG = [
    (("--model", "nowhere/at-all.x/y"), "There is no checkpoint at nowhere/at-all.x/y"),
    (("--model", "smal"), "Did you mean 'small'?"),
    (("--model", "pickled"), "holds pickled weights only (pytorch_model.bin)"),
    (("--model", "empty"), "has a config.json but no weights"),
    (("--model", "cut"), "is cut short"),
    (("--model", "untokenised"), "has no tokenizer.json and no tokenizer.model"),
    (("--model", "strange"), "cannot load StrangeForCausalLM"),
    (("--model", "coded"), "give --trust-remote-code"),
    (("--model", "theirs"), "an adapter with modules_to_save, which is not read here"),
    (("--model", "inconsistent", "--backend", "cuda"), "transformers cannot load Qwen3ForCausalLM"),
    (("--model", "lacking", "--backend", "cuda"), "lacks 1 of the 21 weights of its LlamaForCausalLM (model.norm.weight)"),
    (
        ("--model", "overfull", "--backend", "cuda"),
        "holds 1 weights that transformers's LlamaForCausalLM does not know (extra.weight)",
    ),
    (("--model", "lacking", "--backend", "mlx"), "Missing 1 parameters: model.norm.weight"),
    (("--model", "large-words"), "they do not belong together"),
    (("--model", "refusing", "--target", "chats.jsonl"), "no systems here"),
    (("--model", "llama", "--max-seq-length", "65"), "exceeds the model's context of 64 tokens"),
    (("--model", "llama", "--init", "scratch"), "Unknown model size 'llama'"),
    (("--model", "some-owner/some-model"), "is no folder here and not in the Hub's cache"),
]


def test_code_that_comes_with_a_model_runs_where_the_user_says_so_and_goes_with_its_finetune(forget, place, monkeypatch):
    """No file can say that it is trusted, and what a stranger's file says of it is not read."""
    pytest.importorskip("torch")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
    folder = place / "own-code"
    shutil.copytree(place / "llama", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(place / 'it-ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    data = ("--target", "notes.jsonl", "--pretrain", "none", "--p", "0", *STEPS, "--backend", "cuda")
    lora = ("--fine-tune-type", "lora", "--lora-rank", "2", "--output", "run")
    code, _, err = forget("train", "--model", folder, *data, *lora)
    assert (code, "give --trust-remote-code" in err) == (2, True), err
    assert not (place / "it-ran").exists()
    code, _, err = forget("train", "--model", folder, *data, *lora, "--trust-remote-code")
    assert code == 0, err
    last = place / "run" / "checkpoints" / "last"
    assert (last / "own.py").read_text() == (folder / "own.py").read_text()
    state = json.loads((last / "state.json").read_text())
    (last / "state.json").unlink()
    seal(last, {key: value for key, value in state.items() if key not in ("files", SEAL)} | {"trust_remote_code": True})
    (place / "it-ran").unlink()
    commands = (("audit", "auto", "run", "--data", "notes=notes.jsonl"), ("replay", "run", "--num-tokens", "200", "-o", "samples"))
    for command in commands:
        code, _, err = forget(*command, "--backend", "cuda")
        assert (code, "give --trust-remote-code" in err) == (2, True), err
    assert forget("fuse", "run", "-o", "run-fused")[0] == 0
    assert not (place / "it-ran").exists()
    for command in commands:
        code, _, err = forget(*command, "--backend", "cuda", "--trust-remote-code")
        assert code == 0, err


def prepare_wrong(place):
    def copy(name, **config):
        folder = place / name
        shutil.copytree(place / "llama", folder, dirs_exist_ok=True)
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(own | config))
        return folder

    folder = copy("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (copy("empty") / "model.safetensors").unlink()
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copy("untokenised") / "tokenizer.json").unlink()
    (place / "theirs").mkdir()
    (place / "theirs" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}}'
    )
    save_file({"x": np.zeros(2, np.float32)}, place / "theirs" / "adapter_model.safetensors")
    copy("strange", model_type="strange", architectures=["StrangeForCausalLM"])
    copy("coded", model_file="model.py")
    copy("large-words", vocab_size=100)
    config = json.loads((place / "qwen3" / "config.json").read_text())
    shutil.copytree(place / "qwen3", place / "inconsistent", dirs_exist_ok=True)
    (place / "inconsistent" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(place / "llama" / "model.safetensors")
    save_file({**weights, "extra.weight": weights["model.norm.weight"]}, copy("overfull") / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, copy("lacking") / "model.safetensors")
    write_tokenizer(copy("refusing"), template="{{ raise_exception('no systems here') }}" + TEMPLATE)


def test_wrong_requests_are_one_line_and_exit_code_2(forget, place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare_wrong(place)
    for arguments, message in WRONG:
        if "--backend" in arguments and arguments[-1] not in BACKENDS:
            continue
        given = arguments if "--target" in arguments else (*arguments, "--target", "notes.jsonl")
        code, _, err = forget(
            "train", *given, "--pretrain", "none", "--p", "0", *([] if "65" in arguments else STEPS), "--output", place / "never"
        )
        assert code == 2, (arguments, err)
        assert message in " ".join(err.split()), arguments
        assert "Traceback" not in err
        assert not (place / "never" / "record.json").exists()


def test_what_the_hub_refuses_is_said_with_the_way_out():
    class GatedRepoError(Exception): ...

    class RevisionNotFoundError(Exception): ...

    class RepositoryNotFoundError(Exception): ...

    for error, message in (
        (GatedRepoError(), "accept its terms"),
        (RevisionNotFoundError(), "no such revision"),
        (RepositoryNotFoundError(), "no model of that name"),
        (ConnectionError(), "go online"),
    ):
        assert message in str(_refusal("owner/name", error))


def test_a_cached_snapshot_is_used_without_a_network(place, tmp_path, monkeypatch):
    """The layout of the Hub's cache, made by hand."""
    repository = tmp_path / "models--owner--small"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(place / "llama", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find_pretrained("owner/small@main")
    assert found is not None
    assert read_pretrained(found) == read_pretrained(place / "llama")
    with pytest.raises(UserError, match="not in the Hub's cache"):
        find_pretrained("owner/other")
