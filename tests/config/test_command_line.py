import pytest
from hypothesis import given as cases
from hypothesis import strategies as st
from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.command_line import MAX_NESTING, refusal, split_flags
from megatron_lite.config.given import Given
from megatron_lite.config.megatron_flags import FAMILIES, UNSUPPORTED
from megatron_lite.config.table import flags_by_spelling


def read(*argv):
    given = Given()
    return [(occurrence.flag.name, occurrence.args) for occurrence in split_flags(argv, given)], given


@pytest.mark.parametrize("spelled", ["--log-interval", "--log_interval", "--Log-Interval", "--log-int"])
def test_spellings(spelled):
    occurrences, given = read(spelled, "5")
    assert occurrences == [("--log-interval", ("5",))]
    assert not given.errors


def test_value_after_the_first_equals_sign():
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
def test_aliases_used_by_scripts(alias, name):
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
    outer.write_text(f"--seed 7\n'@{inner}'\n", encoding="utf-8")
    occurrences, given = read(f"@{outer}", "--lr", "1e-3")
    assert occurrences == [("--seed", ("7",)), ("--split", ("969, 30, 1",)), ("--fp16", ()), ("--lr", ("1e-3",))]
    assert not given.errors


def nested(folder, depth):
    """The first of `depth` argument files, each of which names the next; the last holds --fp16."""
    for number in range(depth):
        following = f"'@{folder / str(number + 1)}'" if number + 1 < depth else "--fp16"
        (folder / str(number)).write_text(f"{following} --seed {number}", encoding="utf-8")
    return f"@{folder / '0'}"


def test_argument_files_lie_at_most_ten_deep(tmp_path):
    occurrences, given = read(nested(tmp_path, MAX_NESTING))
    assert not given.errors
    assert [name for name, _ in occurrences] == ["--fp16", *["--seed"] * MAX_NESTING]
    first = nested(tmp_path, MAX_NESTING + 1)
    occurrences, given = read(first, "--bf16")
    assert len(given.errors) == 1
    assert "Argument files include each other without end" in given.errors[0].problem
    assert f"{MAX_NESTING} files deep" in given.errors[0].problem
    assert occurrences[-1] == ("--bf16", ()), "what follows is read all the same"


def test_an_argument_file_that_cannot_be_read_is_named_and_the_rest_is_read(tmp_path):
    (tmp_path / "quotes").write_text("--split '969")
    for name, reason in (("missing", "No such file"), ("quotes", "a quotation mark is not closed")):
        occurrences, given = read(f"@{tmp_path / name}", "--fp16")
        assert occurrences == [("--fp16", ())]
        (error,) = given.errors
        assert f"@{tmp_path / name}" in error.problem and reason in error.problem


def test_at_sign_and_two_dashes_alone_are_values():
    assert read("--save", "@", "--", "x")[0] == [("--save", ("@", "--", "x"))]
    assert read("--save=")[0] == [("--save", ("",))]


def test_arguments_before_the_first_flag_are_an_error():
    occurrences, given = read("5", "--seed", "6")
    assert occurrences == [("--seed", ("6",))]
    assert [error.problem for error in given.errors] == [
        "The command line starts with '5', which is no flag and follows none"
    ]


def test_an_occurrence_is_shown_as_it_was_written():
    assert split_flags(["--Train_iters", "5"], Given())[0].text == "--Train_iters 5"


def test_a_name_or_another_case_of_it_gets_no_note_and_an_alias_one():
    assert read("--Log_Interval", "5")[1].notes == []
    assert read("--vocab", "x")[1].notes == ["--vocab is read as --vocab-file"]


def test_ambiguous_or_unknown_flags(tmp_path):
    for word, match in (
        ("--no-save", "--no-save-optim"),
        ("--xyzzy", "look its name up in --help or docs/arguments.md"),
    ):
        occurrences, given = read(word, "1")
        assert occurrences == [] and given.unknown
        assert match in str(given.errors[0]) and len(given.errors) == 1


def test_a_refused_family_matches_by_prefix():
    occurrences, given = read("--moe-brand-new", "3")
    assert occurrences == [] and not given.unknown
    (error,) = given.errors
    assert "--moe-brand-new 3" in error.problem and "Mixture of experts" in error.rule


@pytest.mark.parametrize(
    ("reason", "fix"),
    sorted({(row.reason, row.fix) for row in (*FAMILIES.values(), *UNSUPPORTED) if row.status == "refused"}),
)
def test_every_refusal_has_a_reason_and_a_fix(reason, fix):
    error = refusal(["--flag 1"], reason, fix)
    assert error.fix == fix and error.rule == reason and "--flag 1" in error.problem
    assert str(error).endswith(f"{reason}. {fix}")


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


def test_repeated_flags_are_noted():
    parsed = parse_run([*SMALL, "--lr", "2e-3", "--lr", "3e-3", "--clip-grad", "1.0", "--clip-grad", "1.0"])
    assert parsed.config.lr.lr == 3e-3
    assert any("overridden" in note and "--lr" in note for note in parsed.notes)
    assert not any("--clip-grad" in note for note in parsed.notes)


@pytest.mark.slow
@cases(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=12))
def test_any_arguments_are_read_or_explained(argv):
    argv = [word for word in argv if not word.startswith("@")]
    _, given = read(*argv)
    assert all(error.problem and error.fix for error in given.errors)
