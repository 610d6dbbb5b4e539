import pytest
from hypothesis import given as cases
from hypothesis import strategies as st
from job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.flags.refused import FAMILIES
from megatron_lite.config.flags.table import flags_by_spelling
from megatron_lite.config.given import Given
from megatron_lite.config.words import read_words


def read(*argv):
    given = Given()
    return [(occurrence.flag.name, occurrence.words) for occurrence in read_words(argv, given)], given


@pytest.mark.parametrize("spelled", ["--log-interval", "--log_interval", "--Log-Interval", "--log-int"])
def test_spellings(spelled):
    occurrences, given = read(spelled, "5")
    assert occurrences == [("--log-interval", ("5",))]
    assert not given.errors


def test_equals_keeps_everything_after_it():
    assert read("--save=a=b", "--split=969, 30, 1")[0] == [("--save", ("a=b",)), ("--split", ("969, 30, 1",))]


def test_a_prefix_is_noted():
    _, given = read("--train-iter", "5")
    assert given.notes == ["--train-iter is read as --train-iters, the only flag that starts so"]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("--vocab", "--vocab-file"),
        ("--tokenizer-name-or-path", "--tokenizer-model"),
        ("--override-lr-scheduler", "--override-opt-param-scheduler"),
        ("--override-opt_param-scheduler", "--override-opt-param-scheduler"),
        ("--no-log-learnig-rate-to-tensorboard", "--no-log-learning-rate-to-tensorboard"),
        ("--checkpoint-num-layers", "--recompute-num-layers"),
        ("--warmup", "--lr-warmup-fraction"),
        ("--local_rank", "--local-rank"),
        ("--contigious-checkpointing", "--contigious-checkpointing"),
        ("--DDP-impl", "--ddp-impl"),
        ("--deepspeed_config", "--deepspeed-config"),
        ("--cpu_torch_adam", "--cpu-torch-adam"),
    ],
)
def test_names_that_scripts_use(alias, name):
    assert read(alias, "1")[0][0][0] == name


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--num-layer-s", "--num-layers"),
        ("--learning-rate", None),
        ("--hiden-size", "--hidden-size"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--xyzzy", None),
    ],
)
def test_an_unknown_flag_proposes_the_nearest(typo, meant):
    _, given = read(typo, "1")
    assert (f"Did you mean {meant}?" if meant else typo) in str(given.errors[0])


def test_argument_files(tmp_path):
    inner = tmp_path / "inner.txt"
    inner.write_text('--split "969, 30, 1"  # a comment\n--fp16')
    outer = tmp_path / "outer.txt"
    outer.write_text(f"--seed 7\n@{inner}\n")
    occurrences, given = read(f"@{outer}", "--lr", "1e-3")
    assert occurrences == [("--seed", ("7",)), ("--split", ("969, 30, 1",)), ("--fp16", ()), ("--lr", ("1e-3",))]
    assert not given.errors


def test_negative_numbers_are_values():
    assert read("--seed", "-1")[0] == [("--seed", ("-1",))]


def test_no_prefix_means_two_things():
    rows = flags_by_spelling()
    for name in rows:
        if name.startswith(tuple(FAMILIES)):
            continue
        for end in range(3, len(name)):
            prefix = name[:end]
            starting = {row.name for full, row in rows.items() if full.startswith(prefix)}
            if prefix not in rows and len(starting) == 1:
                assert read(prefix)[0][0][0] == rows[name].name
                break


def test_repeats_and_their_note():
    parsed = parse_run([*SMALL, "--lr", "2e-3", "--lr", "3e-3", "--clip-grad", "1.0", "--clip-grad", "1.0"])
    assert parsed.config.lr.lr == 3e-3
    assert any("overridden" in note and "--lr" in note for note in parsed.notes)
    assert not any("--clip-grad" in note for note in parsed.notes)


@cases(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=12))
def test_any_words_are_read_or_explained(argv):
    argv = [word for word in argv if not word.startswith("@")]
    _, given = read(*argv)
    assert all(error.rule and error.found for error in given.errors)
