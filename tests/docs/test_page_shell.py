"""The shell of the documentation's commands reports wrong blocks, programs, files and flags."""

from types import SimpleNamespace

import pytest
from support.page_blocks import Block, read_blocks
from support.page_shell import PageShell

FLAGS = (
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--num-layers", "2"),
    *("--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16", "--micro-batch-size", "1"),
    *("--train-iters", "4", "--lr", "1e-3"),
)


@pytest.fixture
def shell(tmp_path):
    shell = PageShell(tmp_path, SimpleNamespace(job=lambda: FLAGS, root=str(tmp_path)))
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nonsense --all", "no stand-in for the program nonsense"),
        ("--num-layer-s 3", "Did you mean --num-layers?"),
        ("megatron-lite explainx", "Did you mean explain?"),
        ("megatron-lite explain … --lr 1e-3 --num-layers 0", "--num-layers 0"),
        ("torchrun --nproc-per-node 3 pretrain_gpt.py … --tensor-model-parallel-size 2", "3 ranks"),
        ("python pretrain_gpt.py --num-layers 2", "Required flags are missing"),
        ("srun megatron-lite doctor --fastest", "--fastest"),
        ("megatron-lite evaluate --load run --tasks piqa --few-shot 3", "unrecognized arguments: --few-shot"),
        ("megatron-lite import model --output x --tensor-model-parallel-size 2 --activaton gelu", "--activaton"),
        ("megatron-lite checkpoint list nowhere", '"nowhere" does not exist'),
        ("megatron-lite curve /etc/passwd", "outside of the test's folder"),
        ("pip install -e '.[hf,nothing]'", "no extra ['nothing']"),
        ("make nothing", "no target ['nothing']"),
        ("python examples/check_loss.py x --expected 3 --tolerance 1", "FileNotFoundError"),
        ("python -c 'import sys; sys.exit(3)'", "$ python -c"),
        ("bash slurm/none.slurm", "No such file"),
        ("if true; then", "syntax error"),
        ("megatron-lite evaluate --load run --tasks a", ""),
        ('flags="--lr 1e-3"; megatron-lite explain … $flags | head -n 1', ""),
        ("--save-interval 500   # a comment\n--keep-last 3 --keep-phase 10:100 90:1000", ""),
        ("echo Once | megatron-lite generate --load run --tensor-model-parallel-size 2", "--load run does not exist"),
    ],
)
def test_faults(text, fault, shell):
    found = shell.run(Block(1, "sh", text))
    assert fault in found and bool(found) == bool(fault)


def test_blocks_and_directives(tmp_path, shell):
    page = """
1. A list:

   <!-- test:
   replace 500 2
   -->
   ```sh
   --save-interval 500
     # indented
   ```

<!-- test: file tasks/task.yaml -->
```yaml
task: x
```

```json
{}
```
"""
    flags, task = read_blocks(page)
    assert (flags.line, flags.text) == (8, "--save-interval 2\n  # indented\n")
    assert shell.run(task) == ""
    assert (tmp_path / "tasks" / "task.yaml").read_text() == "task: x\n"
    for wrong, match in (
        ("\n```\nls\n```\n", "name the language"),
        ("<!-- test: replace a b -->\ntext\n", "no block follows"),
    ):
        with pytest.raises(ValueError, match=match):
            read_blocks(wrong)
