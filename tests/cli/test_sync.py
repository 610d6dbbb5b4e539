"""Tests of the sync command: a folder and a hub repository as the destination, mistakes, no network."""

import zlib

import pytest
from support.hub_server import HubServer

from megatron_lite.cli.main import main
from megatron_lite.interop.hub import Hub
from megatron_lite.runs.catalog import is_complete, set_latest
from megatron_lite.runs.manifest import Manifest, Provenance, SavedFile, SavedPart, encode_manifest
from megatron_lite.runs.turnover import discard


def save(run, iteration):
    folder = run / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    files = {}
    for number in range(10):
        data = b"%d of %d" % (number, iteration) * 100
        (folder / f"{number}.distcp").write_bytes(data)
        files[f"{number}.distcp"] = SavedFile((SavedPart(0, len(data), zlib.crc32(data)),))
    manifest = Manifest(iteration, {}, files, {}, Provenance(), {})
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    set_latest(run, iteration)
    return folder


@pytest.fixture
def run(tmp_path):
    made = tmp_path / "run"
    save(made, 10)
    (made / "metrics.jsonl").write_bytes(b'{"kind": "iteration", "iteration": 1}\n{"kind": "itera')
    return made


@pytest.fixture
def server(monkeypatch):
    import huggingface_hub
    import huggingface_hub.utils._http as http

    made = HubServer()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as slurm/env.sh sets it for training
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    defaults = dict(Hub.__init__.__kwdefaults__)
    monkeypatch.setattr(Hub.__init__, "__kwdefaults__", {**defaults, "sleep": lambda seconds: None})
    yield made
    made.close()


def test_a_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sync", str(run), "--to", "./copies/run", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "copy    iter_0000010/manifest.json" in out and "12 files to copy" in out and "nothing was done" in out
    assert not (tmp_path / "copies").exists()
    assert main(["sync", str(run), "--to", "./copies/run"]) == 0
    assert "12 files copied to copies/run" in capsys.readouterr().out
    assert is_complete(tmp_path / "copies/run/iter_0000010")
    assert main(["sync", str(run), "--to", "copies/run"]) == 0, "a folder that exists is no repository"
    assert "0 files copied" in capsys.readouterr().out
    assert main(["sync", str(tmp_path / "none"), "--to", "copies/run"]) == 1


@pytest.mark.slow
def test_a_repository_gets_a_commit_for_the_logs_and_one_for_each_checkpoint(server, run, capsys):
    command = ["sync", str(run), "--to", "ada/gpt", "--private"]
    assert main(command) == 0
    assert server.private == {"ada/gpt": True}
    assert server.titles("ada/gpt") == ["initial commit", "logs", "iter_0000010", "latest checkpoint: iteration 10"]
    files = server.files("ada/gpt")
    assert files["metrics.jsonl"] == b'{"kind": "iteration", "iteration": 1}\n'
    assert files["latest_checkpointed_iteration.txt"] == b"10\n"
    for path in (run / "iter_0000010").iterdir():
        assert files[f"iter_0000010/{path.name}"] == path.read_bytes()
    server.requests.clear()
    assert main(command) == 0
    assert not server.count("POST", "commit") and not server.count("PUT", "upload")
    assert "0 files copied to ada/gpt" in capsys.readouterr().out
    save(run, 20)
    discard(run / "iter_0000010")
    assert main([*command, "--delete"]) == 0
    assert not [name for name in server.files("ada/gpt") if name.startswith("iter_0000010")]
    assert server.files("ada/gpt")["latest_checkpointed_iteration.txt"] == b"20\n"


@pytest.mark.slow
def test_an_upload_that_was_cut_is_continued(server, run, capsys):
    server.faults = lambda method, path: "cut" if method == "PUT" and len(server.blobs) == 7 else None
    assert main(["sync", str(run), "--to", "ada/gpt"]) == 1
    error = capsys.readouterr().err
    assert "after 5 attempts" in error and "Give the same command again" in error
    assert server.titles("ada/gpt") == ["initial commit", "logs"]
    sent = len(server.blobs)
    server.faults = lambda method, path: None
    server.requests.clear()
    assert main(["sync", str(run), "--to", "ada/gpt"]) == 0
    assert server.count("PUT", "/upload/") == 10 - sent


@pytest.mark.slow
def test_a_checkpoint_deleted_during_the_upload_is_replaced_by_the_next(server, run, capsys):
    def faults(method, path):
        if method == "PUT" and len(server.blobs) == 3 and (run / "iter_0000010").exists():
            save(run, 20)
            discard(run / "iter_0000010")

    server.faults = faults
    assert main(["sync", str(run), "--to", "ada/gpt"]) == 0
    assert "iter_0000010: the run deleted or replaced files" in capsys.readouterr().err
    assert server.titles("ada/gpt")[1:] == ["logs", "iter_0000020", "latest checkpoint: iteration 20"]


@pytest.mark.parametrize(
    ("to", "problem", "fix"),
    [
        (
            "nc1",
            "--to nc1 is neither a folder that exists nor a repository",
            "--to ./nc1 for a new folder, or --to USER/nc1",
        ),
        ("a/b/c", "--to a/b/c is neither", "--to ./a/b/c for a new folder, or --to USER/c"),
        ("", "--to '' is neither", "--to ./NAME for a new folder, or --to USER/NAME"),
        ("~nobody-here/x", "this machine has no user nobody-here", "the path without ~"),
        ("USER/gpt", "USER is a placeholder", "--to NAME/gpt with your user name"),
        ("hf:USER/gpt", "USER is a placeholder", "--to NAME/gpt with your user name"),
    ],
)
def test_names_that_are_neither_a_folder_nor_a_repository(run, tmp_path, monkeypatch, capsys, to, problem, fix):
    monkeypatch.chdir(tmp_path)
    assert main(["sync", str(run), "--to", to]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert problem in error and fix in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_dry_run_to_a_repository_needs_a_token(run, monkeypatch, capsys, tmp_path):
    import huggingface_hub.constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["sync", str(run), "--to", "ada/gpt", "--dry-run"]) == 1
    assert "HF_TOKEN is not set" in capsys.readouterr().err


def test_no_network_no_token_and_foreign_names(server, run, capsys, monkeypatch, tmp_path):
    assert main(["sync", str(run), "--to", "eve/gpt"]) == 1
    assert "--to eve/gpt: the access token belongs to ada" in capsys.readouterr().err
    assert main(["sync", str(run), "--to", "hf:gpt"]) == 1
    assert "Give --to USER/NAME" in capsys.readouterr().err
    server.faults = lambda method, path: "cut"
    assert main(["sync", str(run), "--to", "ada/gpt"]) == 1
    assert "asking who the token belongs to" in (error := capsys.readouterr().err) and "after 5 attempts" in error
    server.faults = lambda method, path: "cut" if method == "PUT" else None
    assert main(["sync", str(run), "--to", "ada/gpt"]) == 1
    assert "uploading the large files" in (error := capsys.readouterr().err) and "after 5 attempts" in error
