import json
import shlex

import numpy as np
import pytest
from support.job_commands import BIG_RAMP, LLAMA, SMALL

from megatron_lite.cli.explain import run
from megatron_lite.config.arguments import parse_run
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.errors import ConfigError


def test_the_text(capsys):
    assert run([*BIG_RAMP, "--world-size", "512"]) == 0
    text = capsys.readouterr().out
    for part in (
        "13B: 12,853,386,240 parameters",
        "311,541 iterations",
        "512 ranks = tensor 2 x pipeline 4 x data 64",
        "ZeRO stage 1 is read as --use-distributed-optimizer",
        "--data-impl mmap has no effect",
        "--deepspeed_config ./ds_config.json: No such file",
        "1-4,961",
    ):
        assert part in text, part


def test_one_rank_and_one_batch_are_singular(capsys):
    run([*BIG_RAMP, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--eval-iters", "1"])
    text = capsys.readouterr().out
    assert " 1 rank = tensor 1" in text and "on 1 batch\n" in text


def test_the_parsed_command_can_be_run(capsys):
    run([*LLAMA, "--world-size", "64"])
    text = capsys.readouterr().out
    argv = text[text.index("as parsed:") :].split(":", 1)[1].replace("\\\n", "").split()
    assert parse_run(argv).config == parse_run(LLAMA, world_size=64).config


def test_json(capsys):
    run(["--json", *BIG_RAMP, "--world-size", "512"])
    record = json.loads(capsys.readouterr().out)
    assert record["derived"]["length"]["iterations"] == 311_541
    assert len(record["derived"]["stages"]) == 64
    assert record["config"]["batch"]["rampup"] == {"start": 16, "increment": 16, "samples": 5_000_000}
    assert record["derived"]["vocabulary_from"].startswith("assumed")
    assert any("--deepspeed_config" in entry for entry in record["missing"])
    assert parse_run(record["argv"]).config == parse_run(BIG_RAMP, world_size=512).config


def test_vocabulary_of_a_null_tokenizer(capsys):
    run(["--json", *SMALL, "--tokenizer-type", "NullTokenizer", "--vocab-size", "99"])
    assert json.loads(capsys.readouterr().out)["derived"]["model"]["vocab_size"] == 100


def test_padded_size_replaces_a_missing_tokenizer(capsys):
    run(["--json", *SMALL, "--pad-vocab-size-to", "1024", "--tokenizer-type", "PretrainedFromHF"])
    assert json.loads(capsys.readouterr().out)["derived"]["model"]["vocab_size"] == 1024


def write_data(prefix):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.arange(100))
    return str(prefix)


DATA = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--split", "8,1,1", "--eval-iters", "5")


def test_data_lines_and_index_sizes(tmp_path, capsys):
    path = write_data(tmp_path / "corpus")
    run([*SMALL, *DATA, "--data-path", path, "--train-iters", "1000000000", "--eval-interval", "0"])
    text = capsys.readouterr().out
    # 8 samples of 32 tokens an iteration, 40 documents of 100 tokens.
    assert "train: 8,000,000,000 samples of corpus (64,000,000.0 epochs)" in text
    assert f"takes 70 GiB of memory while it is built, and 69.4 GiB on disk in {tmp_path / 'cache'}" in text
    assert "validation: 40 samples of corpus (2.6 epochs)" in text
    assert "evaluated at the end only, on 5 batches" in text
    run(["--json", *SMALL, *DATA, "--data-path", path])
    train, valid, _ = json.loads(capsys.readouterr().out)["derived"]["data"]
    assert (train["split"], train["samples"], train["epochs"]) == ("train", 800, {path: 6.4})
    assert (train["index_disk_bytes"], valid["samples"]) == (0, 40)


def test_sample_requests_without_data_files(capsys):
    run([*SMALL, *DATA, "--data-path", "absent", "--train-iters", "1000000000"])
    text = capsys.readouterr().out
    assert "train: 8,000,000,000 samples\n" in text
    assert "the largest sample index takes at least 59.6 GiB of memory" in text
    assert "evaluated every 1,000 iterations and at the end, on 5 batches" in text
    run([*SMALL, *DATA, "--data-path", "absent", "--eval-iters", "0"])
    assert "no evaluation (--eval-iters 0)" in capsys.readouterr().out


def test_explain_reports_the_errors_of_the_trainer():
    with pytest.raises(ConfigError, match="Cannot split a global batch of"):
        run([*SMALL, "--micro-batch-size", "3"])


def test_help(capsys):
    assert run(["--help"]) == 0
    assert "explain [--json]" in capsys.readouterr().out


def test_explain_of_a_command_with_launcher_equals_that_of_its_flags(capsys):
    run([*BIG_RAMP, "--world-size", "512"])
    expected = capsys.readouterr().out
    run(
        [
            "python",
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "8",
            "--nnodes",
            "64",
            "pretrain_gpt.py",
            *BIG_RAMP,
        ]
    )
    assert capsys.readouterr().out == expected


def test_a_job_script_is_explained_from_its_file(capsys, tmp_path):
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH --nodes=2\nsource env.sh\nHOST=$(scontrol show hostnames | head -n 1)\n"
        'srun bash -c "torchrun --nproc-per-node 4 --nnodes 2 --node-rank \\$SLURM_PROCID pretrain_gpt.py '
        f'{shlex.join(SMALL)} --seed 7" 2>&1 | tee -a log.txt\n',
        encoding="utf-8",
    )
    run(["--json", f"@{tmp_path / 'job.sh'}"])
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["parallel"]["world_size"] == 8
    assert record["config"]["runtime"]["seed"] == 7
