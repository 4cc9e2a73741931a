"""`forget audit` on the command line: what scripts rely on, and one clear line for every wrong request."""

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget import checkpoint
from mlx_forget.ladder import model_spec
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.vocabularies import tokenizer_in
from tests.audit.conftest import Weights
from tests.fakes import add_fake_backend


@pytest.fixture
def fake_backend(monkeypatch):
    """`--backend fake` is the NumPy bigram, in this process only."""
    add_fake_backend(monkeypatch)


@pytest.fixture
def audit(run_forget, fake_backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_forget("audit", *arguments, "--backend", "fake")


@pytest.fixture
def finetuned(run_forget, fake_backend, tmp_path, monkeypatch):
    """A run folder, and the folder of the base it started from; trained once by the bigram."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run_forget("train", "--backend", "fake", "--output", "run", "--learning-rate", "0.02", "--json")
    assert code == 0, err
    return tmp_path / "run", json.loads(out)


TOP = set(
    """schema_version base tuned backend device versions row_length texts weights tasks refusals warnings fail_above passed
    tokens_per_second wall_seconds""".split()
)
TEXT = set(
    """name source part fingerprint num_documents num_tokens num_bytes num_masked num_left_out losses smallest_visible_nats progress_lost transitions
    calibration_before calibration_after positions divisions tokens_forgotten tokens_gained documents_forgotten documents_gained
    per_document overlap""".split()
)
LOSSES = set(
    """loss_before loss_after forgetting kl soft_ce hard_ce agreement entropy_before bits_per_byte_before bits_per_byte_after
    bits_per_byte_change""".split()
)


def test_an_audit_of_a_run_needs_no_more_than_its_folder(audit, finetuned, tmp_path):
    folder, record = finetuned
    code, out, err = audit("auto", folder, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == TOP
    assert found["schema_version"] == 1
    assert found["tuned"]["run_id"] == record["run_id"]
    assert found["base"]["run_id"] == record["init"]
    assert [text["name"] for text in found["texts"]] == ["prose", "code"]
    assert "No --data: reading what was held out of the built-in prose and code" in err
    prose, code_text = found["texts"]
    assert set(prose) == TEXT
    assert set(prose["losses"]) == LOSSES
    assert set(prose["losses"]["forgetting"]) == {"value", "stderr", "low", "high"}
    assert code_text["losses"]["forgetting"]["value"] < 0
    assert prose["overlap"] == []
    # The base was pretrained on prose, and only on that.
    curve = checkpoint.find_checkpoint(tmp_path / found["base"]["folder"]).state["curve"]
    fraction = prose["losses"]["forgetting"]["value"] / (curve[0][1] - curve[-1][1])
    assert prose["progress_lost"]["loss_fraction"] == pytest.approx(fraction)
    assert code_text["progress_lost"] is None
    written = tmp_path / "audits" / found["tuned"]["name"]
    assert json.loads((written / "audit.json").read_text()) == found
    assert "What did this model forget?" in (written / "audit.html").read_text()
    assert not list(written.glob(".*"))


@pytest.fixture
def two(finetuned):
    """Before and after, such that prose is forgotten: a few steps teach the bigram both corpora, so undoing them forgets both."""
    folder, _ = finetuned
    base = sorted((forget_home() / "bases").glob("*-fake"))
    return folder, next(path for path in base if path.name.startswith(finetuned[1]["init"]))


def test_the_table_says_what_the_json_says(audit, two):
    code, out, err = audit(*two, "--data", "general=prose", "-o", "a")
    assert code == 0, err
    found = json.loads(Path("a/audit.json").read_text())
    change = found["texts"][0]["losses"]["forgetting"]
    assert f"{change['value']:+.4f}±{change['stderr']:.4f}" in out
    assert "general: forgot" in out
    assert "by kind of token: " in out


def test_a_pipeline_fails_when_too_much_was_forgotten(audit, two):
    code, out, err = audit(*two, "--data", "prose", "--fail-above", "0.0001", "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False
    assert "Too much was forgotten (the limit is 0.0001 nats per token): prose +" in err
    code, out, _ = audit(*two, "--data", "prose", "--fail-above", "9", "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)


def test_max_tokens_reads_the_same_whole_documents_every_time(audit, finetuned):
    folder, _ = finetuned
    arguments = ("auto", folder, "--data", "code", "--max-tokens", "3000", "--json")
    first, again = json.loads(audit(*arguments)[1]), json.loads(audit(*arguments)[1])
    text = first["texts"][0]
    assert text["num_tokens"] <= 3000
    assert text["num_left_out"] > 0
    assert text["losses"] == again["texts"][0]["losses"]


def test_finetuning_data_among_the_audited_text_is_warned_of(run_forget, audit, fake_backend, tmp_path):
    lines = [
        f"Entry {i} of the ledger records {i * i} crowns, paid by the baker on day {i % 30} for {i * 3} loaves.\n"
        for i in range(3000)
    ]
    (tmp_path / "notes.txt").write_text("".join(lines))
    code, _, err = run_forget("train", "--backend", "fake", "--target", "notes.txt", "--iters", "6", "--p", "0", "--output", "run")
    assert code == 0, err
    # Another file, and other divisions: half of it was learnt.
    new = [
        f"Page {i} of the almanac tells of {i} storms in the harbour, and of the {i * 7} boats that went out again.\n"
        for i in range(300)
    ]
    documents = ["".join(lines[i : i + 10]) for i in range(100, 400, 10)] + ["".join(new[i : i + 10]) for i in range(0, 300, 10)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    code, out, err = audit("auto", "run", "--data", "mixed.jsonl", "--json")
    assert code == 0, err
    found = json.loads(out)
    overlap = found["texts"][0]["overlap"]
    # The few that were held out for validation were not learnt.
    assert 24 <= len(overlap) <= 30
    assert any("documents overlap with what the finetune learnt from notes.txt" in warning for warning in found["warnings"])
    # Of the very file that was learnt, only what was held out is read.
    code, out, err = audit("auto", "run", "--data", "notes.txt", "--json")
    assert code == 0, err
    assert "only the documents that were held out of it are read" in err
    assert json.loads(out)["texts"][0]["part"] == "held-out documents"


def test_little_text_says_what_it_allows(audit, finetuned, tmp_path):
    folder, _ = finetuned
    for name, texts in (("one", ["a single document"]), ("few", [f"document {i} is short" for i in range(4)])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    code, out, err = audit("auto", folder, "--data", "one.jsonl", "--data", "few.jsonl", "--json")
    assert code == 0, err
    one, few = json.loads(out)["texts"]
    assert one["losses"]["forgetting"]["stderr"] is None
    assert "one is one document: it allows no standard error" in err
    assert few["smallest_visible_nats"] > 0
    assert "few has only 4 documents: they allow a standard error of" in err


def prepare_wrong_requests(folder, make_checkpoint, spec):
    """Everything that a wrong request below names."""
    make_checkpoint(folder / "base")
    make_checkpoint(folder / "deeper", spec=model_spec("3x32", spec.vocab_size, spec.context_length))
    make_checkpoint(folder / "longer", spec=model_spec("2x32", spec.vocab_size, 64))
    make_checkpoint(folder / "wordless", spec=model_spec("2x32", spec.vocab_size - 60, spec.context_length))
    make_checkpoint(folder / "wordier", spec=model_spec("2x32", spec.vocab_size + 1, spec.context_length))
    other = folder / "other.model"
    content = bytearray(tokenizer_in(folder / "base").read_bytes())
    # A field that SentencePiece skips: the same tokenizer under another hash.
    other.write_bytes(bytes(content) + b"\xfa\x3e\x01x")
    make_checkpoint(folder / "spoken", tokenizer=other)
    for name in ("weightless", "pickled", "foreign", "damaged", "nothing", "without-tokenizer"):
        (folder / name).mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "weightless")
    shutil.copy(folder / "base" / "config.json", folder / "pickled")
    np.save(folder / "pickled" / "pytorch_model.bin", np.zeros(3))
    (folder / "pickled" / "pytorch_model.bin.npy").rename(folder / "pickled" / "pytorch_model.bin")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "base" / name, folder / "foreign")
    shutil.copytree(folder / "base", folder / "damaged", dirs_exist_ok=True)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (folder / "fine.txt").write_text("some words\n" * 200)
    (folder / "file").write_text("")
    (folder / "prompts.txt").write_text("word " * 40 + "\n")


WRONG = [
    (["base", "nowhere"], "There is no folder nowhere"),
    (["nowhere", "base"], "There is no folder nowhere"),
    (["base", "nothing"], "nothing holds no model: give a run folder"),
    (["base", "weightless"], "has a config.json but no weights"),
    (["base", "pickled"], "pickled weights only (pytorch_model.bin), which can run code"),
    (["base", "foreign"], "has no tokenizer.json"),
    (["base", "damaged"], "model.safetensors is damaged"),
    (["base", "deeper"], "The architectures differ: base is 2 layers of width 32, 1 heads, context 32, deeper is 3 layers"),
    (["base", "longer"], "The architectures differ"),
    (["base", "wordier"], "The vocabularies differ: base has 512 entries, wordier 513"),
    (["base", "spoken"], "The tokenizers differ"),
    (["wordless", "wordless"], "its tokenizer has 512 ids and its model knows 452: they do not belong together"),
    (["auto", "base"], "name BASE by its folder"),
    (["base", "base", "--data", "empty.txt"], "holds no text"),
    (["base", "base", "--data", "latin.txt"], "is not UTF-8"),
    (["base", "base", "--data", "missing.txt"], "no file or folder missing.txt"),
    (["base", "base", "--data", "prosa"], "Did you mean 'prose'"),
    (["base", "base", "--data", "a=fine.txt", "--data", "a=latin.txt"], "names 'a' twice"),
    (["base", "base", "--data", "=fine.txt"], "--data takes NAME=SOURCE"),
    (["base", "base", "--data", "fine.txt", "--max-tokens", "0"], "max_tokens must be positive"),
    (["base", "base", "--data", "fine.txt", "--max-seq-length", "4096"], "exceeds the models' context of 32"),
    (["base", "base", "--data", "fine.txt", "--fail-above", "lots"], "fail_above must be of type float"),
    (["base", "base", "--data", "fine.txt", "--fail-above", "nan"], "fail_above must be finite"),
    (["base", "base", "--data", "fine.txt", "--memory-limit-gb", "0.000001"], "--memory-limit-gb 1e-06 is below"),
    (["base", "base", "--data", "fine.txt", "--tasks", " , "], "--tasks takes names"),
    (["base", "base", "--data", "fine.txt", "--refusals", "missing.txt"], "Cannot read missing.txt"),
    (["base", "base", "--data", "fine.txt", "--refusals", "empty.txt"], "holds no prompt"),
    (["base", "base", "--data", "fine.txt", "--refusals", "prompts.txt", "--refusal-tokens", "8"], "lower --refusal-tokens"),
    (["base", "base", "--data", "fine.txt", "-o", "file/x"], "Cannot write to file/x"),
    (["base", "base", "--backend", "cudda"], "Did you mean 'cuda'"),
]


def test_a_wrong_request_is_one_line_and_exit_code_2(run_forget, fake_backend, make_checkpoint, spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_wrong_requests(tmp_path, make_checkpoint, spec)
    for arguments, message in WRONG:
        backend = () if "--backend" in arguments else ("--backend", "fake")
        code, out, err = run_forget("audit", *arguments, *backend)
        assert code == 2, (arguments, err)
        assert message in " ".join(err.split()), arguments
        assert "Traceback" not in err
        assert out == ""
    assert not (tmp_path / "audits").exists()


def test_tasks_without_lm_eval_give_the_pip_line(audit, make_checkpoint, tmp_path, monkeypatch):
    import importlib.util

    make_checkpoint(tmp_path / "base")
    (tmp_path / "fine.txt").write_text("some words\n" * 200)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest))
    code, _, err = audit("base", "base", "--data", "fine.txt", "--tasks", "arc_easy")
    assert code == 2
    assert "pip install 'mlx-forget[eval]'" in err


def test_refusals_are_counted_before_and_after(audit, finetuned, tokenizer, tmp_path):
    """A bigram that always answers one thing, before and after it was taught to decline."""
    folder, _ = finetuned
    found = checkpoint.find_checkpoint(folder)
    spec, name = found.model_spec(), "bigram.weight"

    def speaking(text, target, *, next_document=""):
        table = np.zeros((spec.vocab_size, spec.vocab_size))
        ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_id, *tokenizer.encode(next_document).tolist()]
        assert len(set(ids)) == len(ids)
        table[:, ids[0]] = 5.0
        for a, b in itertools.pairwise(ids):
            table[a, b] = 9.0
        assert load_file(found.weights)[name].shape == table.shape
        state = {"run_id": target, "is_pretraining": False, "step": 1}
        checkpoint.save_checkpoint(
            tmp_path / target, Weights({name: table}), spec, found.tokenizer, state, with_training_state=False
        )

    # What follows the end of an answer is none of it.
    speaking("Sure,", "before", next_document="I cannot")
    speaking("I cannot", "after")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ("How?", "Why not now?", "Where to?")))
    (tmp_path / "fine.txt").write_text("some words\n" * 200)
    arguments = ("--data", "fine.txt", "--refusals", "prompts.jsonl", "--refusal-tokens", "12", "--json")
    code, out, err = audit("before", "after", *arguments)
    assert code == 0, err
    refusals = json.loads(out)["refusals"]
    assert (refusals["rates"]["before"], refusals["rates"]["after"], refusals["rates"]["gained"]) == (0, 1, 3)
    assert refusals["answers"][1][0] == "Why not now?"
    assert refusals["answers"][1][1:] == ["Sure,", "I cannot"]


def test_weights_that_are_no_numbers_are_one_sentence(audit, finetuned, tmp_path):
    folder, _ = finetuned
    found = checkpoint.find_checkpoint(folder)
    table = np.full_like(load_file(found.weights)["bigram.weight"], np.nan)
    state = {"run_id": "broken", "is_pretraining": False, "step": 1}
    broken = Weights({"bigram.weight": table})
    checkpoint.save_checkpoint(tmp_path / "broken", broken, found.model_spec(), found.tokenizer, state, with_training_state=False)
    (tmp_path / "fine.txt").write_text("some words\n" * 200)
    code, _, err = audit(folder, "broken", "--data", "fine.txt", "--fail-above", "0.1")
    assert code == 1
    assert "The tuned model's losses on fine are not all finite" in err


def test_standard_input_is_a_text(audit, two, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"some words\n" * 200)))
    code, out, err = audit(*two, "--data", "mine=-", "--json")
    assert code == 0, err
    assert [text["name"] for text in json.loads(out)["texts"]] == ["mine"]
