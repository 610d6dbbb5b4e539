"""Pushing to the hub, played by a server on loopback: faults, reruns, revisions, and errors before any work."""

from __future__ import annotations

import json

import pytest
from support.hub_server import HubServer
from support.trainer import command

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.hub import Hub

QUIET = ("--no-verify", "--no-tokenizer")


@pytest.fixture
def server(monkeypatch):
    import huggingface_hub

    made = HubServer()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)  # restored, for pushing changes it
    # Its own retries wait for seconds.
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    yield made
    made.close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited between attempts, none of which passes."""
    waited = []
    defaults = dict(Hub.__init__.__kwdefaults__)
    monkeypatch.setattr(Hub.__init__, "__kwdefaults__", {**defaults, "sleep": waited.append})
    return waited


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "README.md").write_text("# model\n")
    for number in (1, 2):
        (made / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes([number]) * 1000)
    return made


def test_push(server, folder, waits):
    hub = Hub("ada/gpt", private=True)
    hub.check_access()
    address = hub.push(folder, "main", "Iteration 7")
    assert server.private == {"ada/gpt": True}
    assert server.titles("ada/gpt") == ["initial commit", "Iteration 7"]
    assert server.files("ada/gpt") == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert address.startswith(f"{server.endpoint}/ada/gpt/commit/")
    assert waits == []


def test_the_servers_faults_are_retried(server, folder, waits):
    """One 5xx of every step, and one connection that is cut in the middle of a commit and of an upload."""
    failed = set()

    def faults(method, path):
        step = path.split("/")[1 if path.startswith("/upload") else -2]
        if (method, step) in failed:
            return None
        failed.add((method, step))
        return "cut" if step in ("commit", "upload") else 503

    server.faults = faults
    notes = []
    hub = Hub("ada/gpt", notify=notes.append)
    hub.check_access()
    hub.push(folder, "iter_7", "Iteration 7")
    assert server.files("ada/gpt", "iter_7") == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert server.titles("ada/gpt", "iter_7")[-1] == "Iteration 7"
    assert len(failed) > 5
    assert waits[:1] == [1.0]
    assert any("trying again in 1 s" in note for note in notes)


def test_a_push_that_was_cut_goes_on(server, folder, waits):
    """The second file's upload fails for good; a rerun sends that one only."""
    second = __import__("hashlib").sha256(bytes([2]) * 1000).hexdigest()
    server.faults = lambda method, path: "cut" if path.endswith(second) else None
    with pytest.raises(CheckpointError, match="Give the same command again") as caught:
        Hub("ada/gpt").push(folder, "main", "Iteration 7")
    assert "after 5 attempts" in str(caught.value)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert server.titles("ada/gpt") == ["initial commit"]  # nothing half-written
    sent = len(server.blobs)
    server.faults = lambda method, path: None
    server.requests.clear()
    Hub("ada/gpt").push(folder, "main", "Iteration 7")
    assert (sent, server.count("PUT", "/upload/")) == (1, 1)
    assert len(server.files("ada/gpt")) == 4


def test_a_fault_that_is_ours_is_not_retried(server, folder, waits):
    server.faults = lambda method, path: 403 if "commit" in path else None
    with pytest.raises(CheckpointError, match="Committing to main"):
        Hub("ada/gpt").push(folder, "main", "Iteration 7")
    assert waits == []


def test_no_token_and_malformed_names(server, monkeypatch, tmp_path):
    for name in ("gpt", "ada/g/pt", "ada/", "a da/gpt", "ada/" + "x" * 100):
        with pytest.raises(ConfigError, match="USER/NAME"):
            Hub(name)
    monkeypatch.delenv("HF_TOKEN")
    import huggingface_hub.utils._auth as auth

    monkeypatch.setattr(auth.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(auth, "_get_token_from_google_colab", lambda: None)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        Hub("ada/gpt")
    assert server.requests == []


def test_who_may_write(server):
    Hub("ada/gpt").check_access()
    with pytest.raises(ConfigError, match="belongs to ada, who cannot write to bob"):
        Hub("bob/gpt").check_access()
    server.orgs = (("lab", "write"), ("club", "read"))
    Hub("lab/gpt").check_access()
    with pytest.raises(ConfigError, match="cannot write to club"):
        Hub("club/gpt").check_access()
    server.role = "read"
    with pytest.raises(ConfigError, match="has read access only"):
        Hub("ada/gpt").check_access()
    server.faults = lambda method, path: 401
    with pytest.raises(ConfigError, match="rejects the access token"):
        Hub("ada/gpt").check_access()


def test_a_name_that_cannot_be_written_is_an_error_before_any_work(server, make_checkpoint, tmp_path):
    load = make_checkpoint()
    result = command("export", load, "--push-to", "bob/gpt", "--output", tmp_path / "out", *QUIET)
    assert result.code == 1
    assert "bob/gpt" in result.err
    assert not (tmp_path / "out").exists()
    assert server.repositories == {}


def test_export_and_push(server, make_checkpoint, tmp_path):
    load = make_checkpoint()
    dry = command("export", load, "--push-to", "ada/gpt", "--dry-run", *QUIET)
    assert dry.code == 0
    assert "would push to ada/gpt, revision main" in dry.out
    assert "model.safetensors" in dry.out
    assert server.requests == []
    result = command("export", load, "--push-to", "ada/gpt", "--output", tmp_path / "out", *QUIET)
    assert result.code == 0, result.err
    assert "pushed to ada/gpt, revision main: http" in result.out
    assert server.files("ada/gpt").keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert b"# gpt" in server.files("ada/gpt")["README.md"]


@pytest.mark.slow
def test_revisions_from_a_run(server, make_checkpoint, waits):
    for iteration in (2, 4, 6):
        load = make_checkpoint(iteration=iteration)
    words = ("export", load, "--push-to", "ada/gpt", "--revisions-from-run", *QUIET)
    # The third is interrupted between its branch and its commit.
    server.faults = lambda method, path: 400 if path.endswith("/commit/iter_6") else None
    assert command(*words).code == 1
    assert set(server.repositories["ada/gpt"]) == {"main", "iter_2", "iter_4", "iter_6"}
    server.faults = lambda method, path: None
    result = command(*words)
    assert result.code == 0, result.err
    assert "has revision iter_2 already" in result.out
    assert "pushed to ada/gpt, revision iter_6" in result.out
    server.requests.clear()
    assert command(*words).code == 0
    assert server.count("POST", "/commit/") == 0
    for iteration in (2, 4, 6):
        assert server.titles("ada/gpt", f"iter_{iteration}")[-1] == f"Iteration {iteration}"
        assert json.loads(server.files("ada/gpt", f"iter_{iteration}")["config.json"])["n_layer"] == 4


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), "say where to"),
        (("--output", "x", "--private"), "--private goes with --push-to"),
        (("--output", "x", "--dry-run"), "--dry-run goes with --push-to"),
        (("--push-to", "ada/gpt", "--revisions-from-run", "--output", "x"), "leave --output"),
        (("--output", "x", "--max-shard-size", "5 apples"), "is no size"),
        (("--output", "x", "--to", "onnx"), "invalid choice"),
    ],
)
def test_flags_that_do_not_go_together(words, found, tmp_path):
    result = command("export", tmp_path, *words)
    assert result.code == 2
    assert found in result.err


def test_a_run_without_checkpoints(server, tmp_path):
    result = command("export", tmp_path, "--push-to", "ada/gpt", "--revisions-from-run")
    assert result.code == 1
    assert "contains no complete checkpoint" in result.err
