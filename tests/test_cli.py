"""The command line: what scripts rely on, and one clear line for every wrong request."""

import itertools
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlx_forget import backends
from mlx_forget.config import TrainConfig
from mlx_forget.distributed import Group
from mlx_forget.errors import Interrupted
from mlx_forget.history import read_history
from mlx_forget.records import read_record
from tests.fakes import add_fake_backend


@pytest.fixture
def fake_backend(monkeypatch):
    """`--backend fake` is the NumPy bigram, in this process only."""
    add_fake_backend(monkeypatch)
    return "fake"


@pytest.fixture
def train(run_forget, fake_backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_forget("train", "--backend", "fake", *arguments)


CONTRACT = set(
    """schema_version run_id status backend device config versions seed num_params num_non_embedding_params num_steps wall_seconds
    tokens_per_second peak_memory_bytes data losses forgetting_nats progress_lost""".split()
)


def test_a_finetune_with_no_arguments_trains_its_base_once_and_writes_the_contract(train, run_forget, tmp_path):
    code, out, err = train("--json")
    assert code == 0, err
    record = json.loads(out)
    assert out.count("\n") == 1
    assert set(record) >= CONTRACT
    assert record["status"] == "finished"
    assert set(record["losses"]) == {"start", "best", "end"}
    assert set(record["losses"]["best"]) == {"step", "target_train", "target_val", "pretrain_val"}
    assert set(record["progress_lost"]) == {"loss_fraction", "token_equivalent"}
    difference = record["losses"]["best"]["pretrain_val"] - record["losses"]["start"]["pretrain_val"]
    assert record["forgetting_nats"] == pytest.approx(difference)
    roles = {row["role"]: row for row in record["data"].values()}
    assert set(roles) == {"target", "pretrain"}
    assert set(roles["target"]) == {"fingerprint", "role", "unique_tokens", "tokens_seen", "same_as_published"}
    assert "Corpus code: same as published: no" in err
    folder = tmp_path / "runs" / f"{record['run_id']}-fake"
    assert read_record(folder) == record
    assert yaml.safe_load((folder / "config.yaml").read_text())["target"] == "code"
    assert read_history(folder / "history.arrows").num_rows == 5
    assert not (folder / "checkpoints" / "previous").exists()

    code, out, err = train("--json")
    assert (code, json.loads(out)) == (0, record)
    assert "done already" in err

    code, out, err = run_forget("runs", "list", "runs", "--json")
    assert [row["run_id"] for row in json.loads(out)["runs"]] == [record["run_id"]]
    assert run_forget("runs", "show", folder, "--json")[1].strip() == json.dumps(record)
    code, out, _ = train("--dry-run", "--p", "5%", "--json")
    plan = json.loads(out)
    assert plan["run_id"] != record["run_id"]
    assert plan["num_pretrain_tokens"] > 0


def test_a_flag_beats_the_file_and_the_file_beats_the_default(train, tmp_path):
    (tmp_path / "c.yaml").write_text("replay-ratio: 2%\nmax_steps: 3\neval_rows: 8\n")
    code, out, err = train("-c", "c.yaml", "--iters", "2", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["num_steps"] == 2


@pytest.mark.parametrize(
    "limit, steps",
    [
        (["--stop-tokens", "4096"], 4),
        (["--stop-epochs", "1", "--target-tokens", "5120"], 10),
        (["--tokens-per-param", "0.1"], None),
    ],
)
def test_token_and_epoch_limits_set_the_number_of_steps(train, limit, steps):
    code, out, err = train("--p", "50%", "--iters", "500", "--dry-run", "--json", *limit)
    assert code == 0, err
    plan = json.loads(out)
    assert plan["num_steps"] == steps or plan["num_tokens"] == pytest.approx(0.1 * plan["num_params"], abs=8 * 128)


WRONG = [
    (["--p", "1.5"], "p must lie in [0, 1)"),
    (["--p", "lots"], "p must be a share"),
    (["--model", "0.66m"], "Did you mean '0.65m'"),
    (["--target", "cod"], "Did you mean 'code'"),
    (["--target", "missing.txt"], "no file or folder missing.txt"),
    (["--target", "empty.txt"], "holds no text"),
    (["--target", "latin.txt"], "is not UTF-8"),
    (["--target", "tiny.txt"], "smaller than one row"),
    (["--target", "bad.jsonl"], "bad.jsonl, line 2"),
    (["--backend", "cudda"], "Did you mean 'cuda'"),
    (["--method", "injektion"], "Did you mean 'injection'"),
    (["--iters", "0"], "iters must be positive"),
    (["--learning-rate", "inf"], "learning_rate must be positive and finite"),
    (["--stop-target-loss", "nan"], "stop_target_loss must be positive and finite, it is nan"),
    (["--weight-decay", "nan"], "weight_decay must not be negative, it is nan"),
    (["--beta1", "nan"], "beta1 must be at least 0 and below 1, it is nan"),
    (["--beta2", "1"], "beta2 must be at least 0 and below 1, it is 1"),
    (["--seed", "99999999999999999999999"], "seed must be below 2^63"),
    (["--vocab-size", "3"], "no room for 270 reserved ids"),
    (["-c", "repeated.yaml"], "'iters' is given twice"),
    (["--iters", "many"], "iters must be of type int"),
    (["--init", "nowhere"], "no checkpoint at nowhere"),
    (["--pretrain", "none"], "no pretraining data to inject"),
    (["--target-tokens", "999999999"], "too few"),
    (["--p", "90%", "--iters", "100000"], "never repeated"),
    (["-c", "missing.yaml"], "Cannot read missing.yaml"),
    (["-c", "unknown.yaml"], "Did you mean 'batch_size'"),
    (["-c", "twice.yaml"], "given twice"),
    (["-c", "broken.yaml"], "not valid YAML"),
    (["--resume"], "nothing to resume"),
    (["--tokenizer", "empty.txt"], "empty.txt"),
    (["--stop-tokens", "10"], "below one step"),
    (["--no-such-option"], "No such option"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_a_wrong_request_is_one_line_and_exit_code_2(train, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "tiny.txt").write_text("a word")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    (tmp_path / "unknown.yaml").write_text("batch_sizes: 3\n")
    (tmp_path / "twice.yaml").write_text("p: 1%\nreplay_ratio: 2%\n")
    (tmp_path / "repeated.yaml").write_text("iters: 6\niters: 900\n")
    (tmp_path / "broken.yaml").write_text("p: [\n")
    code, out, err = train(*arguments)
    assert code == 2
    assert message in " ".join(err.split()).replace("│ ", "")
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists() or arguments == ["--resume"]


def test_a_run_folder_with_another_config_is_refused_and_kept(train, tmp_path):
    assert train("--output", "r", "--iters", "6")[0] == 0
    before = (tmp_path / "r" / "record.json").read_text()
    code, _, err = train("--output", "r", "--iters", "7", "--num-threads", "1")
    assert code == 2
    # What the run is not named by is no reason.
    assert "another run" in err
    assert "(differing: iters)" in " ".join(err.split())
    assert (tmp_path / "r" / "record.json").read_text() == before


def test_a_folder_without_write_permission_is_refused(train, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        code, _, err = train("--output", tmp_path / "file" / "r")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        code, _, err = train("--output", tmp_path / "closed" / "r")
    assert code == 2
    assert "Cannot write" in err


def test_a_backend_that_is_not_installed_gives_the_pip_line(train, monkeypatch):
    row = backends.Backend("nowhere:T", "no_such_framework", "pip install 'mlx-forget[cuda]'")
    monkeypatch.setitem(backends.BACKENDS, "cuda", row)
    code, _, err = train("--backend", "cuda")
    assert code == 2
    assert "pip install 'mlx-forget[cuda]'" in err


def test_device_cuda_without_a_gpu_is_an_error(run_forget, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="a job without torch has no CUDA backend to refuse")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    code, _, err = run_forget(
        "train",
        "--backend",
        "cuda",
        "--device",
        "cuda",
        "--init",
        "scratch",
        "--pretrain",
        "none",
        "--p",
        "0",
    )
    assert code == 2
    assert "no CUDA device" in err


def text_in_parts(text, documents):
    """The text cut at the starts of the documents."""
    starts = [*sorted(text.index(document) for document in documents), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(starts)]


def test_prepare_and_data_round_trip_a_users_text(run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(f"line {i}: spaces  and\ttabs, ünïcödé, ▁ and emoji 🙂\n" for i in range(1500))
    Path("notes.txt").write_text(text, encoding="utf-8")
    code, out, err = run_forget("prepare", "notes.txt", "--output", "store", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert sum(row["num_bytes"] for row in facts["splits"].values()) == len(text.encode())
    heads = [run_forget("data", "head", "store", "-n", "100", "--split", name, "--json")[1] for name in ("train", "validation")]
    documents = [row["text"] for head in heads for row in json.loads(head)["documents"]]
    assert sorted(documents, key=text.index) == text_in_parts(text, documents)
    assert run_forget("data", "info", "store", "--json")[1] == json.dumps(facts) + "\n"
    assert "line" in run_forget("data", "sample", "store", "-n", "1")[1]
    assert run_forget("data", "verify", "store")[0] == 0
    code, _, err = run_forget("prepare", "notes.txt", "--output", "store")
    assert code == 2
    assert "exists already" in err
    shard = Path("store/train-00000.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = run_forget("data", "verify", "store")
    assert code == 2
    assert "train-00000.arrow is damaged" in err


def test_each_command_names_the_one_that_usually_comes_next(train, run_forget, tmp_path):
    def proposed(err):
        return shlex.split(err.partition("Next: forget ")[2].partition("\n")[0])

    Path("notes.txt").write_text("".join(f"Note {i} is about {i * i}.\n" for i in range(3000)), encoding="utf-8")
    code, _, err = run_forget("prepare", "notes.txt", "--output", "my store")
    assert (code, proposed(err)) == (0, ["train", "--target", "my store"])
    code, out, err = train(*proposed(err)[1:], "--p", "5%", "--iters", "4", "--output", "run")
    assert (code, proposed(err)) == (0, ["audit", "auto", "run"]), err
    assert "p served: 6.25% of rows" in out
    assert "Next" not in train("--target", "my store", "--p", "5%", "--iters", "4", "--output", "run", "--json")[2]


def test_a_store_of_another_tokenizer_is_refused(train, run_forget, tmp_path):
    Path("notes.txt").write_text("".join(f"some words to learn by heart {i}\n" for i in range(2000)))
    assert run_forget("prepare", "notes.txt", "-o", "store", "--tokenizer", "new", "--vocab-size", "296")[0] == 0
    code, _, err = train("--target", "store")
    assert code == 2
    assert "another tokenizer" in err
    code, _, err = train("--target", "store", "--init", "scratch", "--pretrain", "none", "--p", "0", "--iters", "3")
    assert code == 0, err


def test_a_damaged_checkpoint_is_named_and_not_used(train, tmp_path):
    assert (
        train(
            "--output",
            "base",
            "--init",
            "scratch",
            "--target",
            "prose",
            "--pretrain",
            "none",
            "--p",
            "0",
            "--iters",
            "4",
        )[0]
        == 0
    )
    code, _, err = train("--init", "base", "--max-seq-length", "4096")
    assert code == 2
    assert "exceeds the model's context of 128" in err
    weights = tmp_path / "base" / "checkpoints" / "last" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    code, _, err = train("--init", "base")
    assert code == 2
    assert "model.safetensors is damaged" in err


def test_a_corrupt_record_is_named(train, run_forget, tmp_path):
    assert train("--output", "r", "--iters", "4")[0] == 0
    (tmp_path / "r" / "record.json").write_text("{")
    code, _, err = run_forget("runs", "show", "r")
    assert code == 2
    assert "record.json is damaged" in err


def test_an_interrupted_preparation_names_its_store(run_forget, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted("interrupted", signal=15)

    (tmp_path / "notes.txt").write_text("a few words " * 200)
    monkeypatch.setattr("mlx_forget.pipeline.catalog.new_tokenizer", stopped)
    code, out, _ = run_forget(
        "prepare", tmp_path / "notes.txt", "--tokenizer", "new", "--vocab-size", 300, "-o", tmp_path / "s", "--json"
    )
    assert (code, json.loads(out)["folder"]) == (143, str(tmp_path / "s"))


def test_two_processes_do_not_train_in_one_folder(train, tmp_path):
    import fcntl

    (tmp_path / "r").mkdir()
    with (tmp_path / "r" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = train("--output", "r")
    assert code == 2
    assert "Another process" in err


def test_processes_of_a_run_take_the_rows_that_fit_on_all_of_them(fake_backend, monkeypatch):
    """Those that share a model take every pass together: one with less memory left decides for all."""
    from mlx_forget.training import plan

    class Two(Group):
        rank, size = 0, 2

        def all_sum(self, values):
            # The other has room for three rows.
            return values + np.array([0.0, 3.0]) if len(values) == 2 else values

    monkeypatch.setattr(plan, "join_group", lambda backend: Two())
    made = plan.plan_run(TrainConfig(backend="fake"))
    assert made.step().rows > 3
    assert (made.micro_batch_size, made.base.micro_batch_size) == (3, 3)
    assert plan.plan_run(TrainConfig(backend="fake", micro_batch_size=2)).micro_batch_size == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("what", ["run", "base"])
def test_what_diverged_once_is_not_taken_for_trained(train, tmp_path, what):
    """A second call must not pass: neither for the run, nor by finetuning the random weights of a base model that diverged."""
    (tmp_path / "hot.yaml").write_text("learning_rate: 1.0e+300\n" if what == "run" else "base: {learning_rate: 1.0e+300}\n")
    for _ in range(2):
        code, _, err = train("-c", "hot.yaml", "--output", "r")
        assert code == 1, err
        assert "diverged" in err
        assert "record.json" in err
    assert (tmp_path / "r" / "record.json").exists() == (what == "run")


def test_square_brackets_in_names_are_names(train, tmp_path):
    code, _, err = train("--output", "runs/[draft] a [/b]")
    assert code == 0, err
    assert "runs/[draft] a [/b]" in " ".join(err.split())
