"""Tests of job script evaluation against bash itself, and of what is recorded instead of being run."""

import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError
from megatron_lite.ops.shell.evaluate import evaluate_script
from megatron_lite.ops.shell.text import unknown_sources

SHOW = "show() { printf '<%s>' \"$@\"; echo; }\n"

SCRIPTS = {
    "quotes": """A=3; B="x $A ${C:-d} $((A*2+1))"; show $B "$B" '$B' \\$B a"b c"d $'a\\tb' "a\\"b" "a\\nb" """,
    "line continuation": 'v=x; CMD=" \\\n  a.py \\\n  --x $v \\\n"; show $CMD',
    "arrays": 'A=(--a 1 "b c" $A); A+=(z); A[6]=q; show "${A[@]}" ${A[@]} "${#A[@]}" "${A[2]}" "${A[*]}" "${A[@]:1:2}"',
    "empty arrays": 'g=(); show "${g[@]}" end; E=""; show $E "$E" x$E',
    "associative arrays": 'declare -A M=([a]=1 [b]="2 3"); show "${M[b]}" ${M[a]}',
    "trimming": "x=/a/b/c.tar.gz; show ${x##*/} ${x%%.*} ${x%.gz} ${x#*/} ${x/b/q} ${x//a/_} ${#x} ${x:3:2} ${x: -2}",
    "defaults": 'v=x; show "${NOPE-d}" "${NOPE:+z}" "${v:+z}" "${v:=w}" "${n:=new}" $n',
    "case changes": "y=a; y+=b; show $y ${y^^} ${y^}",
    "indirection": "v=x; w=v; show ${!w}",
    "braces": "for i in {1..3} {5..1..2} a,b {p,q}r; do show $i; done",
    "conditions": 'if [[ $U == 1 ]]; then show 1; elif [ "$U" = "" ]; then show empty; else show no; fi',
    "elif after assignments": "R=2\nif [[ $R == 1 ]]; then A=1   B=2\nelif [[ $R ]]; then A=3   B=4\nfi\nshow $A $B",
    "case": "case foo.txt in *.json|*.txt) show match ;; *) show none ;; esac",
    "functions": 'f() { local q=$1; show "f:$q" "$#" "$@"; return 3; }; f a "b c"; show $?',
    "while": "n=0; while [ $n -lt 3 ]; do show $n; n=$((n+1)); done",
    "until": "until [ ${k:-0} -ge 2 ]; do k=$((k+1)); show k$k; done",
    "for": "for ((i=0;i<4;i+=2)); do show $i; done",
    "break and continue": "for i in 1 2 3; do [ $i = 2 ] && continue; show c$i; [ $i = 3 ] && break; done",
    "substitution": 'show $(echo a b | tr a-z A-Z) "$(printf "%s-%03d" x 7)" `echo z`',
    "arithmetic on texts": 'D="N*2/(3)"; N=6; show $((D)) $(( N ? 5 : 6 )) $(( 7 % 4 )) $(( -7 / 2 )) $((2**5))',
    "positional parameters": 'set -- p q r; show "$1" "$@" $#; shift; show "$1" $#',
    "regular expressions": "[[ abc =~ ^a.c$ && -n x ]] && show yes || show no",
    "read": 'read -r p q <<< "one two three"; show "$p" "$q"; IFS=, read -r -a a <<< "1,2"; show "${a[1]}" "${#a[@]}"',
    "and or not": "true && false || show fallback; ! false && show neg",
    "word splitting": 'A="a   b"; show $A "$A" x$A"y"',
    "here-documents": 'v=1\nshow "$(cat <<EOT\nv $v $((1+1)) \\$v\nEOT\n)" "$(cat <<\'EOT\'\nv $v\nEOT\n)"',
    "files": 'cat <<EOT > cfg.json\n{"a": $((2*3))}\nEOT\necho more >> cfg.json\nshow "$(cat cfg.json)" "$(<cfg.json)"',
    "current folder": "mkdir -p sub; cd sub; show $(basename `pwd`); cd ..; show $(basename $PWD)",
    "subshells": 'a=1; (cd /; a=2; export e=5; exit 3; show no); show $? $a "[$e]"; show $(basename "$PWD")',
    "subshells of substitutions": "d=$(cd / && pwd); show $d $(basename $PWD); x=$(y=5; echo $y; exit 4); show $x [$y]",
    "subshells of pipes": 'echo a b | read p q; show "[$p]"; echo c | { read r; show "$r"; }; show "[$r]"',
    "eval": 'v=3; eval "show ev$v"',
}


def by_bash(script, folder):
    env = {**os.environ, "LC_ALL": "C.UTF-8"}  # bash counts bytes in other locales
    script = SHOW + script
    return subprocess.run(
        ["bash", "-s"], input=script, stdout=-1, encoding="utf-8", cwd=folder, env=env, check=False
    ).stdout


def by_evaluation(script, folder):
    found = evaluate_script(script, environment={}, folder=folder, name="job.slurm")
    shown = [command.arguments[1:] for command in found.commands if command.arguments[0] == "show"]
    return "".join("".join(f"<{text}>" for text in (words or [""])) + "\n" for words in shown)


@pytest.mark.parametrize("name", SCRIPTS)
def test_words_equal_those_of_bash(name, tmp_path):
    expected = by_bash(SCRIPTS[name], tmp_path)
    for left in ("cfg.json", "sub"):
        path = tmp_path / left
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert expected.strip(), "bash shows something"
    assert by_evaluation(SCRIPTS[name], tmp_path) == expected


TEXTS = st.sampled_from(["a", "b c", "", "x.y/z", "7", " p  q ", "--flag=1", "*", "é"])
PIECES = st.sampled_from(
    """$v|"$v"|${v}|"${v:-d e}"|${w:-x y}|${v%.*}|${v##*/}|'$v'|$((n+1))|"$((n*2))"|lit|$(echo $v)|"$(echo "$v")"
    |${v/a/b}|${#v}|"${a[@]}"|${a[@]}|"${a[*]}"|-{1..2}|\\$v|""|${v:1:2}|${v^^}""".replace("\n    ", "").split("|")
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS, max_size=3),
    TEXTS,
    st.integers(-5, 50),
    st.lists(st.lists(PIECES, min_size=1, max_size=4), min_size=1),
)
def test_any_word_expands_as_in_bash(tmp_path_factory, items, value, number, words):
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    array = " ".join(f"'{item}'" for item in items)
    script = f"a=({array}); v='{value}'; n={number}; show {' '.join(''.join(word) for word in words)}"
    assert by_evaluation(script, folder) == by_bash(script, folder)


def test_programs_are_recorded_and_not_run(tmp_path):
    found = evaluate_script(
        f"rm -rf {tmp_path}/keep\n/bin/touch {tmp_path}/made\nexport A=1\nB=2 srun -n 2 python x.py > log 2>&1",
        environment={},
        folder=tmp_path,
        name="job",
    )
    assert [command.arguments[0] for command in found.commands] == ["/bin/touch", "srun"]
    assert found.commands[1].line == 4 and found.exported == {"A": "1"}
    assert not list(tmp_path.iterdir())


def test_output_of_a_program_is_unknown_and_named(tmp_path):
    found = evaluate_script(
        "A=$(scontrol show hostnames $N | head -n 1)\nsrun x --address $A:6000 --twice $((A*2))",
        environment={},
        folder=tmp_path,
        name="job",
    )
    *_, address, _, twice = found.commands[-1].arguments
    assert address.endswith(":6000") and unknown_sources(address) == ["scontrol show"] == unknown_sources(twice)
    assert list(found.missing) == ["N"]


def test_a_shell_within_a_command_sees_exported_variables_only(tmp_path):
    script = "export A=1\nB=2\nsrun -l bash -c 'run $A [$B] $SLURM_PROCID \"$1\"' name first | tee log"
    found = evaluate_script(script, environment={}, folder=tmp_path, name="job")
    assert [command.arguments for command in found.commands] == [("srun", "-l", "run", "1", "[]", "0", "first")]


def test_a_script_of_its_own_is_read(tmp_path):
    (tmp_path / "inner.sh").write_text("exec python $1")
    (tmp_path / "settings").write_text("export WHO=me\nreturn 0\nWHO=you")
    found = evaluate_script("source settings\nsrun bash inner.sh $WHO.py", environment={}, folder=tmp_path, name="job")
    assert found.commands[0].arguments == ("srun", "python", "me.py") and found.exported == {"WHO": "me"}
    absent = evaluate_script("source absent\nrun $X", environment={}, folder=tmp_path, name="job")
    assert list(absent.missing_sources) == ["absent"] and list(absent.missing) == ["X"]


def test_sources_that_may_be_absent(tmp_path):
    found = evaluate_script(
        "source absent || true\n[ -f other ] && source other\nrun", environment={}, folder=tmp_path, name="job"
    )
    assert found.missing_sources == {} and [command.arguments for command in found.commands] == [("run",)]


def test_output_of_a_program_is_not_evaluated(tmp_path):
    found = evaluate_script('eval "$(conda shell.bash hook)"\nrun', environment={}, folder=tmp_path, name="job")
    assert [command.arguments[0] for command in found.commands] == ["run"] and not found.notes


@pytest.mark.slow
def test_bad_scripts_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"job\.slurm is no valid bash script: .*1:1"):
        evaluate_script("if true\n", environment={}, folder=tmp_path, name="job.slurm")
    with pytest.raises(ConfigError, match=r"stopped in line 1, after more than 100,000 commands"):
        evaluate_script("while true; do :; done", environment={}, folder=tmp_path, name="job.slurm")


def test_loops_that_wait_for_a_program_are_run_once(tmp_path):
    found = evaluate_script("while squeue -j 1; do sleep 5; poll; done\nrun", environment={}, folder=tmp_path, name="j")
    assert [command.arguments[0] for command in found.commands] == ["squeue", "poll", "run"]
