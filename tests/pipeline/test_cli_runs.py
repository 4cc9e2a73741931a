"""`forget train` on conversations, on several sources, with p along the run: what is served is what is recorded."""

import json

import pytest

from tests.fakes import add_fake_backend


@pytest.fixture
def train(run_forget, tmp_path, monkeypatch):
    """`forget train` on the NumPy bigram."""
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_forget("train", "--backend", "fake", *arguments)


@pytest.fixture
def files(tmp_path):
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{role} says {i * 37 % 101} and {turn}"}
                for turn in (1, 2)
                for role in ("user", "assistant")
            ]
        }
        for i in range(300)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt").write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(3000)))


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
def test_conversations_train_on_their_answers(train, files, layout):
    options = ("--target", "chats.jsonl", "--pretrain", "notes.txt", "--p", "25%", "--rows", layout, "--iters", "8")
    code, out, err = train(*options, "--output", layout, "--json")
    assert code == 0, err
    record = json.loads(out)
    chats, notes = record["data"]["chats.jsonl"], record["data"]["notes.txt"]
    assert record["p"]["rows"] == 0.25
    share = notes["tokens_seen"] / (notes["tokens_seen"] + chats["tokens_seen"])
    assert record["p"]["tokens"] == pytest.approx(share)
    assert share > 0.3
    code, out, err = train(*options, "--no-mask-prompt", "--output", f"{layout}-all", "--json")
    assert code == 0, err
    assert json.loads(out)["data"]["chats.jsonl"]["tokens_seen"] > 1.4 * chats["tokens_seen"]


def test_p_can_be_a_share_of_tokens(train, files):
    options = ("--target", "chats.jsonl", "--pretrain", "notes.txt", "--p", "20%", "--rows", "padded", "--iters", "24")
    code, out, err = train(*options, "--p-of", "tokens", "--output", "t", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["p"]["tokens"] == pytest.approx(0.2, abs=0.02)
    assert record["p"]["rows"] < 0.15


def test_a_share_of_tokens_goes_by_the_shares_of_several_sources(train, files, tmp_path):
    """Not by their sizes: nine rows in ten are of the source with few tokens in a row."""
    lines = (tmp_path / "chats.jsonl").read_text().replace("says", "answers")
    (tmp_path / "more.jsonl").write_text(lines)
    pretrain = ("--pretrain", "notes.txt=1/10,more.jsonl=9/10", "--p", "20%", "--p-of", "tokens")
    code, out, err = train("--target", "chats.jsonl", *pretrain, "--rows", "padded", "--iters", "48", "--output", "s", "--json")
    assert code == 0, err
    assert json.loads(out)["p"]["tokens"] == pytest.approx(0.2, abs=0.02)


def test_several_sources_are_served_by_their_shares(train, files):
    options = (
        "--target",
        "chats.jsonl=50%,code=50%",
        "--pretrain",
        "notes.txt=3/4,prose=1/4",
        "--p",
        "25%",
        "--target-tokens",
        "6400",
    )
    code, out, err = train(*options, "--init", "auto", "--iters", "16", "--output", "m", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert set(record["data"]) == {"chats.jsonl", "code", "notes.txt", "prose"}
    assert {row["role"] for row in record["data"].values()} == {"target", "pretrain"}
    assert record["p"]["rows"] == 0.25
    assert record["data"]["notes.txt"]["tokens_seen"] == 3 * record["data"]["prose"]["tokens_seen"]
    assert record["data"]["code"]["unique_tokens"] == 3200


def test_p_along_the_run(train, files):
    options = ("--target", "notes.txt", "--pretrain", "prose", "--iters", "20", "--dry-run", "--json")
    plans = {}
    for p in ("10%", "0..20%", "50% until 90%, 5%", "10% until 50%, 10%"):
        code, out, err = train(*options, "--p", p)
        assert code == 0, err
        plans[p] = json.loads(out)
    rows = {p: plan["num_pretrain_tokens"] / 128 for p, plan in plans.items()}
    assert rows["10%"] == rows["0..20%"] == 16
    assert rows["50% until 90%, 5%"] == pytest.approx(0.5 * 144 + 0.05 * 16, abs=1)
    assert len({plan["run_id"] for plan in plans.values()}) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (("--p", "0..x"), "p must be a share"),
        (("--p", "5%, 1%"), "every stage but the last"),
        (("--p", "0..5%", "--mixture", "bernoulli"), "A schedule of p is exact"),
        (("--p", "0..5%", "--stop-epochs", "1"), "needs a constant p"),
        (("--rows", "pakced"), "Did you mean 'packed'"),
        (("--pretrain-epochs", "0"), "pretrain_epochs"),
        (("--pretrain", "prose=50%,cpp=40%"), "add up to 0.9"),
        (("--p", "0..5%", "--pretrain", "none", "--pretrain", "nothing"), "Unknown corpus, recipe or path"),
    ],
)
def test_bad_mixtures_are_one_sentence(train, files, options, message):
    code, _, err = train("--target", "notes.txt", *options, "--dry-run")
    assert code == 2
    assert message in err
