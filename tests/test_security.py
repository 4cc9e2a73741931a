"""What SECURITY.md promises about code that hides in data."""

import ast
import pickle
from pathlib import Path

import pytest

from mlx_forget.cli import main
from mlx_forget.errors import UserError
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.replay.sampled_store import _sampled_shard
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.sweeps.grid import read_recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for package in ("mlx_forget", "cuda_backend") for path in sorted((ROOT / package).rglob("*.py"))]
# Its workers talk to their own parent over pipes.
PICKLES_OVER_ITS_OWN_PIPES = ROOT / "mlx_forget" / "pipeline" / "harvest.py"


def calls(path):
    """(dotted name, keyword names and constant values) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
            yield ast.unparse(node.func), keywords


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_no_module_opens_a_pickle_or_runs_text():
    assert len(SOURCES) > 100
    for path in SOURCES:
        if path != PICKLES_OVER_ITS_OWN_PIPES:
            assert {"pickle", "marshal", "shelve", "dill", "cloudpickle"}.isdisjoint(imports(path)), path
        for name, keywords in calls(path):
            assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "torch.load"), (path, name)
            assert keywords.get("shell", False) is False, (path, name)
            # What a user decides is no constant.
            assert keywords.get("trust_remote_code") is not True, (path, name)
            if name.split(".")[-2:] == ["np", "load"]:
                assert keywords.get("allow_pickle") is False, (path, name)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_where_a_file_is_expected_is_refused_and_not_opened(tmp_path):
    sprung = tmp_path / "sprung"
    content = pickle.dumps(Bomb(str(sprung)))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_vocabulary(tmp_path / "tokenizer.model")
    (tmp_path / "rows.npy").write_bytes(content)
    assert _sampled_shard(tmp_path / "rows.npy", (1, 1), 10) is None
    (tmp_path / "c.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{sprung}]")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "c.yaml")
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()


def test_a_manifest_cannot_name_files_outside_of_its_store(tmp_path):
    import json
    import shutil

    from mlx_forget.pipeline.store import open_store

    shutil.copytree(ROOT / "tests" / "pipeline" / "samples" / "store-v1", tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["splits"]["train"][0]["tokens"] = "../s/train-00000.arrow"
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside of the store"):
        open_store(tmp_path / "s")


def test_yaml_that_only_takes_time_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(UserError, match="nested more than 50 levels"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "trust_remote_code: true",
        "config: {trust-remote-code: yes}",
        "grid: {trust_remote_code: [true]}",
        "arms: {one: {base.trust_remote_code: 1}}",
        "stages: [{target: code}, {trust_remote_code: true}]",
    ],
)
def test_no_file_says_that_code_of_others_may_run(tmp_path, capsys, text):
    path = tmp_path / "theirs.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match="no file can say that for you"):
        read_recipe(path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(path), "--dry-run"])
    assert stop.value.code == 2
    assert "no file can say" in " ".join(capsys.readouterr().err.split())
    path.write_text("config: {trust_remote_code: false, target: code}\n")
    assert read_recipe(path).config["trust_remote_code"] is False
