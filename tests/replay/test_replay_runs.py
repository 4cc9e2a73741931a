"""Whole runs with each method: the command line's requests, exact resume with a reference, and ids that do not move."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import Interrupted
from mlx_forget.history import read_history
from mlx_forget.methods import METHODS
from mlx_forget.pipeline.sides import read_masked
from mlx_forget.pipeline.store import open_store
from mlx_forget.training.identity import run_id
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute, start_trainer, trainer_spec, with_base
from mlx_forget.training.watch import Watch
from tests.fakes import add_fake_backend

BACKENDS = ["fake", *available_backends()]


@pytest.fixture(autouse=True)
def fake_backend(monkeypatch, tmp_path):
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "keys, identifier",
    [({}, "b48a0bb776b9"), ({"p": "5%", "seed": 3}, "701f55fd046c"), ({"method": "plain", "p": "0"}, "2c92f83d63c2")],
)
def test_ids_of_runs_that_replay_nothing_are_what_they_were(keys, identifier):
    data = {"target": "a", "pretrain": "b"}
    assert run_id(TrainConfig(**keys), precision="fp32", learning_rate=6e-4, data=data, init="c") == identifier


def test_only_injection_injects_by_default():
    assert {name: TrainConfig(method=name).p for name in METHODS} == {
        name: "1%" if name == "injection" else "0" for name in METHODS
    }
    assert TrainConfig(method="kl-replay", p="2%").p == "2%"
    assert TrainConfig(init="scratch").p == "0"


class Interrupt:
    """A stop after some questions of the loop."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return 15 if self.left < 0 else None


def config(backend, **keys):
    return from_layers(
        TrainConfig, scale_defaults(), {"backend": backend, "num_threads": 1, "iters": 12, "steps_per_eval": 4, **keys}
    )


METHOD_RUNS = {
    "kl-replay": {"coefficient": 2.0},
    "ntp-replay": {"replay_data": "pretrain", "replay_rows": 3},
    "lwf": {},
    "anchored-adamw": {"coefficient": 30.0},
    "ewc": {"coefficient": 5.0, "replay_tokens": 2048},
    "l2-sp": {},
    "low-lr": {},
    "plain": {},
}


def test_a_record_says_whether_a_replayed_corpus_is_the_published_one():
    data = execute(plan_run(config("fake", method="ntp-replay", replay_data="math", iters=2)))["data"]
    assert {name for name, entry in data.items() if "same_as_published" in entry} == {"code", "prose", "replay:math"}


def test_progress_lost_is_read_on_the_curve_of_the_same_text_only():
    base = execute(plan_run(config("fake", init="scratch", target="prose", pretrain="none", iters=8)))
    assert base["status"] == "finished"
    init = str(plan_run(config("fake", init="scratch", target="prose", pretrain="none", iters=8)).folder)
    same, other = (execute(plan_run(config("fake", init=init, pretrain=name)))["progress_lost"] for name in ("prose", "math"))
    assert same["loss_fraction"] is not None
    assert other == {"loss_fraction": None, "token_equivalent": None}


@pytest.mark.parametrize("backend", ["fake", *(pytest.param(name, marks=pytest.mark.full) for name in available_backends())])
@pytest.mark.parametrize("method", METHOD_RUNS)
def test_a_run_with_each_method_says_what_it_did(backend, method):
    plan = plan_run(config(backend, method=method, **METHOD_RUNS[method]))
    record = execute(plan)
    assert record["status"] == "finished"
    assert all(np.isfinite(value) for losses in record["losses"].values() for value in losses.values())
    assert record["method"]["name"] == method
    replay = {name: row for name, row in record["data"].items() if row["role"] == "replay"}
    expected = {"kl-replay": {"replay:self": 12 * 2 * 128}, "ntp-replay": {"replay:prose": 12 * 3 * 128}}
    assert {name: row["tokens_seen"] for name, row in replay.items()} == expected.get(method, {})
    assert record["learning_rate"] == pytest.approx(plan_run(config(backend)).schedule.peak * (0.1 if method == "low-lr" else 1))
    assert record["p"]["rows"] == 0


@pytest.mark.parametrize(
    "method, replay_data",
    [
        *itertools.product(["kl-replay", "ntp-replay"], ["self", "online", "pretrain"]),
        ("ewc", "self"),
        ("lwf", "self"),
        ("l2-sp", "self"),
    ],
)
def test_a_coefficient_of_zero_is_plain_finetuning_and_samples_nothing(method, replay_data, monkeypatch):
    monkeypatch.setattr("tests.fakes.BigramTrainer.sample", None)
    plain = execute(plan_run(config("fake", method="plain")))
    record = execute(plan_run(config("fake", method=method, coefficient=0.0, replay_data=replay_data)))
    assert record["losses"] == plain["losses"]
    assert not any(row["role"] == "replay" for row in record["data"].values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["kl-replay", "ewc", "anchored-adamw"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(backend, method, tmp_path):
    """The reference and the Fisher information are those of the start again, not of the checkpoint."""
    keys = {"method": method, **METHOD_RUNS[method], "p": "0"}
    straight = execute(plan_run(config(backend, **keys), folder=tmp_path / "straight"))
    plan = plan_run(config(backend, **keys), folder=tmp_path / "broken")
    with pytest.raises(Interrupted):
        execute(plan, watch=Watch(interrupted=Interrupt(5 if method == "anchored-adamw" else 9)))
    resumed = execute(plan_run(config(backend, **keys), folder=tmp_path / "broken"), resume=True)
    assert resumed["num_resumes"] == 1
    assert resumed["losses"] == straight["losses"]
    columns = ["step", "batch_loss", "target_val_windows", "pretrain_val_windows", "grad_norm"]
    ours, theirs = (read_history(tmp_path / name / "history.arrows").select(columns).to_pylist() for name in ("broken", "straight"))
    assert ours == theirs
    a, b = (load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("broken", "straight"))
    assert all((a[key] == b[key]).all() for key in b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_online_replay_serves_the_rows_of_the_stored_sample_and_resumes(backend, tmp_path):
    keys = {"method": "kl-replay", "replay_data": "online"}
    straight = execute(plan_run(config(backend, **keys), folder=tmp_path / "straight"))
    with pytest.raises(Interrupted):
        execute(plan_run(config(backend, **keys), folder=tmp_path / "broken"), watch=Watch(interrupted=Interrupt(7)))
    resumed = execute(plan_run(config(backend, **keys), folder=tmp_path / "broken"), resume=True)
    assert resumed["losses"] == straight["losses"]
    assert straight["data"]["replay:online"] == {
        "fingerprint": None, "role": "replay", "unique_tokens": 12 * 2 * 128, "tokens_seen": 12 * 2 * 128,
    }  # fmt: skip


@pytest.fixture
def base(run_forget):
    """A small run to start from."""
    arguments = ("--init", "scratch", "--target", "prose", "--pretrain", "none", "--p", "0", "--iters", "4", "--output", "base")
    code, _, err = run_forget("train", "--backend", "fake", *arguments)
    assert code == 0, err
    return "base"


def test_replay_writes_a_store_that_a_run_takes_as_replay_data(run_forget, base, tmp_path):
    code, out, err = run_forget("replay", base, "--num-tokens", "10K", "-o", "store", "--backend", "fake", "--seed", "3", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["splits"]["train"]["num_tokens"] == -(-10_000 // 128) * 128
    assert "samples of run" in facts["source"]
    assert "The samples are noise" in err, "four steps teach nothing"
    kl = ("train", "--backend", "fake", "--init", base, "--method", "kl-replay", "--iters", "4", "--json")
    code, out, err = run_forget(*kl, "--replay-data", "store", "--output", "r")
    assert code == 0, err
    record = json.loads(out)
    assert record["data"]["replay:store"]["fingerprint"] == facts["fingerprint"]
    assert "sampled from run" not in err
    code, out, err = run_forget(*kl, "--replay-data", "store", "--dry-run")
    assert json.loads(out)["run_id"] == record["run_id"]
    assert json.loads(run_forget(*kl, "--dry-run")[1])["run_id"] != record["run_id"]
    code, _, err = run_forget(
        "train", "--backend", "fake", "--init", "r", "--method", "kl-replay", "--iters", "2", "--replay-data", "store"
    )
    assert code == 0, err
    assert "was sampled from run" in " ".join(err.split())


WRONG_TRAIN = [
    (["--method", "kl-replay", "--coefficient", "-1"], "(c of kl-replay) must be finite and not negative"),
    (["--method", "plain", "--coefficient", "2"], "'plain' has no coefficient"),
    (["--method", "low-lr", "--coefficient", "0"], "nothing is learnt"),
    (["--method", "kl-reply"], "Did you mean 'kl-replay'"),
    (["--method", "lwf", "--init", "scratch"], "init: scratch has none"),
    (["--method", "ntp-replay", "--replay-data", "pretrain", "--pretrain", "none"], "--pretrain is none"),
    (["--method", "ewc", "--replay-data", "online"], "measured before training"),
    (["--method", "kl-replay", "--replay-data", "nowhere.txt"], "no file or folder nowhere.txt"),
    (["--method", "plain", "--pretrain", "none", "--init", "x", "--max-forgetting", "0.1"], "no pretraining loss to hold it to"),
    (["--method", "kl-replay", "--replay-rows", "0"], "replay_rows must be positive"),
    (["--method", "kl-replay", "--replay-tokens", "1.2.3K"], "300K or 2M"),
]


@pytest.mark.parametrize("arguments, message", WRONG_TRAIN, ids=[" ".join(a) for a, _ in WRONG_TRAIN])
def test_wrong_methods_are_one_line_and_exit_code_2(run_forget, arguments, message):
    code, out, err = run_forget("train", "--backend", "fake", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_limit_of_forgetting_stops_chooses_and_is_shown(run_forget, tmp_path):
    """What was over the limit is no candidate, and the record and the list say so."""
    keys = {"method": "plain", "iters": 12, "learning_rate": 0.05}
    free = execute(plan_run(config("fake", **keys), folder=tmp_path / "runs" / "free"))
    assert free["selection"] == {"measure": "target_val", "max_forgetting": None, "over_the_limit_at": None}
    limit = free["forgetting_nats"] / 3
    held = execute(plan_run(config("fake", **keys, max_forgetting=limit), folder=tmp_path / "runs" / "held"))
    assert held["status"] == "stopped"
    assert held["selection"]["over_the_limit_at"] == held["losses"]["end"]["step"] > held["losses"]["best"]["step"]
    assert held["forgetting_nats"] <= limit < free["forgetting_nats"]
    _, out, _ = run_forget("runs", "list", tmp_path / "runs")
    assert f"(of {limit:g})" in out
    _, out, _ = run_forget("runs", "list", tmp_path / "runs", "--where", "max_forgetting > 0", "--json")
    assert [row["run_id"] for row in json.loads(out)["runs"]] == [held["run_id"]]


def test_numbers_of_tokens_may_have_a_unit():
    given = config("fake", method="ewc", replay_tokens="4K", target_tokens="0.5M")
    assert (given.replay_tokens, given.target_tokens) == (4000, 500_000)


# --- what rows are replayed ---


def started(backend, **keys):
    """The plan of a run whose trainer has been given all that it needs, and the trainer with what `set_fisher` got."""
    plan = plan_run(config(backend, **keys))
    plan = with_base(plan, Watch()) if plan.base is not None else plan
    trainer = load_backend(plan.backend)(trainer_spec(plan))
    measured, set_fisher = [], trainer.set_fisher

    def watched(tokens, mask, segment):
        measured.append((tokens, mask, segment))
        set_fisher(tokens, mask, segment)

    trainer.set_fisher = watched
    return start_trainer(plan, trainer, Watch()), trainer, measured


@pytest.fixture
def chats(tmp_path):
    said = [("user", "Is {i} {i} {i} a word that we know?"), ("assistant", "No, {j} is not.")]
    rows = [[{"role": role, "content": text.format(i=i, j=i * 7 % 13)} for role, text in said] for i in range(800)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["documents", "padded"])
def test_stored_replay_is_laid_out_and_masked_like_the_other_data(chats, backend, layout):
    keys = {"method": "ntp-replay", "replay_data": "chats.jsonl", "rows": layout, "iters": 2}
    plan, trainer, _ = started(backend, **keys)
    batch = plan.stream.batch(0)
    own = batch.term == 1
    assert own.sum() == 2
    assert 0 < batch.loss_mask[own].mean() < 0.9
    if layout == "documents":
        assert (batch.segment[own].max(1) > 0).all(), "documents do not see each other"
    trainer.train_step(batch, 1e-3).read()
    counted = sum(int(b.loss_mask[b.term == 1].sum()) for b in map(plan.stream.batch, range(2)))
    assert plan.stream.replay.tokens_before(2)[0] == counted
    unmasked, _, _ = started(backend, **keys, mask_prompt=False)
    again = unmasked.stream.batch(0)
    assert batch.loss_mask[own].sum() < again.loss_mask[again.term == 1].sum()


def test_fisher_rows_keep_documents_apart(chats):
    _, _, measured = started("fake", method="ewc", rows="documents", replay_data="chats.jsonl")
    ((tokens, _, segment),) = measured
    assert segment.shape == (len(tokens), tokens.shape[1] - 1)
    assert (segment.max(1) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fisher_rows_are_of_every_source_by_its_share_and_masked(chats, backend):
    """The prose store is many times as large as the chats."""
    keys = {"method": "ewc", "rows": "padded"}
    _, _, measured = started(backend, **keys, replay_data="prose=3/4,chats.jsonl=1/4")
    ((tokens, mask, _),) = measured
    _, _, ((chat_tokens, chat_mask, _),) = started(backend, **keys, replay_data="chats.jsonl")
    known = {tuple(row): kept for row, kept in zip(chat_tokens.tolist(), chat_mask.tolist(), strict=True)}
    found = [known[tuple(row)] == kept for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True) if tuple(row) in known]
    assert len(tokens) == 256
    assert len(found) == 64
    assert all(found)
    assert 0 < chat_mask.mean() < 0.5, "questions and padding do not count"


def test_a_models_own_sample_stays_whole_rows_whatever_the_layout(run_forget, base):
    assert run_forget("replay", base, "--num-tokens", "10K", "-o", "store", "--backend", "fake")[0] == 0
    plan, _, _ = started("fake", init=base, method="ntp-replay", replay_data="store", rows="padded")
    assert plan.stream.replay.read(0, rank=0, world_size=1)[1:] == (None, None)


# --- other tokenizers ---


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer.json whose documents begin with 0 and end with 1, and text."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(3000))
    (tmp_path / "notes.txt").write_text(text)
    folder = tmp_path / "foreign"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text[:20_000]], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|start|>", "eos_token": "<|stop|>"}))
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_with_another_tokenizer_samples_itself(run_forget, foreign, backend, tmp_path):
    data = ("--target", "notes.txt", "--pretrain", "none", "--p", "0", "--iters", "2")
    arguments = ("--backend", backend, "--init", "scratch", "--tokenizer", foreign, *data, "--output", "base")
    code, _, err = run_forget("train", *arguments)
    assert code == 0, err
    ask = ("--num-tokens", "300", "--length", "16", "--prompt", "A note", "--backend", backend)
    code, _, err = run_forget("replay", "base", "-o", "store", *ask)
    assert code == 0, err
    store = open_store(tmp_path / "store")
    assert (store.bos_id, store.eos_id) == (0, 1)
    keys = {"init": "base", "target": "notes.txt", "pretrain": None, "method": "ntp-replay", "iters": 2}
    own, online = (started(backend, **keys, replay_data=name)[0].stream.replay for name in ("self", "online"))
    stored, _, _ = read_masked(own.subset, np.arange(own.subset.num_rows))
    sampled, _, _ = online.read(0, rank=0, world_size=1)
    assert (stored[:, 0] == 0).all()
    assert (sampled[:, 0] == 0).all()
    assert {tuple(row) for row in sampled.tolist()} <= {tuple(row) for row in stored.tolist()}


WRONG_REPLAY = [
    (["nowhere"], "no checkpoint at nowhere"),
    (["base", "--num-tokens", "lots"], "300K or 2M"),
    (["base", "--length", "0"], "--length must be positive, it is 0"),
    (["base", "--length", "129"], "exceeds the model's context of 128"),
    (["base", "--temperature", "0"], "temperature must be positive"),
    (["base", "--precision", "fp8"], "Unknown precision"),
    (["base", "--backend", "fakee"], "Unknown backend"),
]


@pytest.mark.parametrize("arguments, message", WRONG_REPLAY, ids=[" ".join(a) for a, _ in WRONG_REPLAY])
def test_wrong_samples_are_one_line_and_exit_code_2(run_forget, base, tmp_path, arguments, message):
    code, out, err = run_forget("replay", "--backend", "fake", "-o", "s", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert not (tmp_path / "s").exists()


def test_a_store_of_another_tokenizer_is_refused_as_replay_data(run_forget, base, tmp_path):
    (tmp_path / "notes.txt").write_text("".join(f"some words to learn by heart {i}\n" for i in range(2000)))
    assert run_forget("prepare", "notes.txt", "-o", "other", "--tokenizer", "new", "--vocab-size", "296")[0] == 0
    code, _, err = run_forget("train", "--backend", "fake", "--init", base, "--method", "kl-replay", "--replay-data", "other")
    assert code == 2
    assert "another tokenizer" in err
