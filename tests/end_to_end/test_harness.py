"""`megatron-lite evaluate`: tasks of lm_eval, texts and LAMBADA against transformers on the exported checkpoint."""

import json
import logging
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from support.trainer import command
from torch.nn import functional as F

from megatron_lite.evaluation.detokenizers import detokenize_wikitext, num_words

pytestmark = pytest.mark.slow

DATA = "dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {0}, train: {0}}}\n"
TASKS = {
    "tiny_words": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
num_fewshot: 1
fewshot_split: train
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}


@pytest.fixture(scope="module")
def documents(corpus):
    return [json.loads(line)["text"] for line in corpus.text.read_text(encoding="utf-8").splitlines()[:12]]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "run"
    shape = ("--seq-length", 32, "--max-position-embeddings", 32, "--hidden-size", 32, "--num-attention-heads", 4)
    job = corpus.job(*shape, "--train-iters", 30, "--lr", 1e-2, "--save", folder)
    assert command(*job, "--save-interval", 15, "--log-interval", 30).code == 0
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """Return the exported model and its tokenizer in transformers."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    out = run.parent / "exported"
    done = command("export", run, "--output", out, "--no-verify", "--no-card")
    assert done.code == 0, done
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    return SimpleNamespace(model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(out))


def greedy_text(exported, text):
    """Return the greedy continuation of 12 tokens up to the letter e, from a context that leaves room for them."""
    ids = torch.tensor([exported.tokenizer.encode(text)[-20:]])
    with torch.no_grad():
        new = exported.model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    return exported.tokenizer.decode(new, skip_special_tokens=True).partition("e")[0]


@pytest.fixture(scope="module")
def tasks(documents, exported, tmp_path_factory):
    """Return the folder of the tasks' YAML files."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "data.jsonl").open("w") as file:
        for number, text in enumerate(documents):
            words = text.split()
            choices = [f" {words[-1]}", f" {words[0]} {words[1]}", f" {words[3]}"]
            start = " ".join(words[:9])
            record = {"text": start, "choices": choices, "label": number % 3, "answer": greedy_text(exported, start)}
            file.write(json.dumps(record) + "\n")
    data = DATA.format(folder / "data.jsonl")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{data}{text.lstrip()}")
    return folder


@pytest.fixture
def hf_model(exported, monkeypatch):
    """Return lm_eval's hf model. It imports accelerate, which it needs for models that it loads itself only."""
    stub, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    stub.Accelerator = stub.InitProcessGroupKwargs = stub.find_executable_batch_size = utils.get_max_memory = None
    monkeypatch.setitem(sys.modules, "accelerate", stub)
    monkeypatch.setitem(sys.modules, "accelerate.utils", utils)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=exported.model, tokenizer=exported.tokenizer, batch_size=3, max_length=32)


def evaluate(run, *args):
    return command("evaluate", "--load", run, "--device", "cpu", *args)


def test_metrics_equal_those_of_lm_evals_own_model(run, tasks, hf_model):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    args = ("--tasks", ",".join(TASKS), "--include-path", tasks, "--batch-size", 5)
    done = evaluate(run, *args, "--json")
    assert done.code == 0, done
    found = {one["task"]: one for one in json.loads(done.out)["results"]}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    wanted = simple_evaluate(model=hf_model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    for task in TASKS:
        metrics = {key.partition(",")[0]: value for key, value in wanted[task].items() if key.endswith(",none")}
        metrics = {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
        assert metrics, wanted[task]
        for name, value in metrics.items():
            assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert found["tiny_generation"]["exact_match"] == 1.0
    assert 0 < found["tiny_choice"]["acc"] < 1 and found["tiny_choice"]["num_fewshot"] == 1
    table = evaluate(run, *args)
    assert "tiny_choice (window 32, 1-shot)" in table.out and "±" in table.out


def test_figures_equal_those_of_a_plain_script(run, exported, documents, tmp_path):
    """WikiText in sliding windows and LAMBADA, computed directly with transformers."""
    wiki, lambada = tmp_path / "wiki", tmp_path / "lambada.jsonl"
    wiki.write_text(" = Abc = \n" + " \n".join(documents[:4]).replace(" b", " , b") + " \n")
    lambada.write_text("".join(json.dumps({"text": " ".join(text.split()[:9])}) + "\n" for text in documents))
    done = evaluate(run, "--wikitext", wiki, "--lambada", lambada, "--stride", 8, "--json")
    assert done.code == 0, done
    of_wiki, of_lambada = json.loads(done.out)["results"]
    model, tokenizer = exported.model, exported.tokenizer
    original = wiki.read_text()
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(detokenize_wikitext(original))])
    total, done_to = 0.0, 1
    for start in range(0, len(ids) - 1, 8):
        end = min(start + 32, len(ids) - 1)
        with torch.no_grad():
            logits = model(ids[None, start:end]).logits[0]
        losses = F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
        total, done_to = total + float(losses[done_to - start - 1 :].sum()), end + 1
        if end == len(ids) - 1:
            break
    assert of_wiki["word_perplexity"] == pytest.approx(math.exp(total / num_words(original)), rel=1e-4)
    right, losses = 0, []
    for line in lambada.read_text().splitlines():
        context, _, word = json.loads(line)["text"].rpartition(" ")
        whole, start = tokenizer.encode(f"{context} {word}"), len(tokenizer.encode(context))
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits[0, start - 1 :]
        labels = torch.tensor(whole[start:])
        losses.append(float(F.cross_entropy(logits, labels, reduction="sum")))
        right += bool((logits.argmax(-1) == labels).all())
    assert of_lambada["accuracy"] == right / len(losses)
    assert of_lambada["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_all_checkpoints_reuse_recorded_tasks(run, tasks):
    args = ("--tasks", "tiny_words", "--include-path", tasks, "--all-checkpoints")
    assert evaluate(run, *args).code == 0
    again = evaluate(run, *args)
    assert again.code == 0 and "loaded" not in again.err and "tiny_words" in again.out


def test_errors(run, tasks, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    for constants in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local, hub = tmp_path / "local.yaml", tmp_path / "hub.yaml"
    kind = 'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    data = DATA.format(tasks / "data.jsonl")
    (tmp_path / "wrong.yaml").write_text(f"task: wrong\n{kind.replace('text}', 'text|x}')}{data}")
    (tmp_path / "broken.yaml").write_text(f"task: broken\n{kind}{data}process_results: !function broken.fail\n")
    (tmp_path / "broken.py").write_text("def fail(doc, results):\n    raise KeyError('page')\n")
    local.write_text(f"task: local\n{kind}dataset_path: json\ndataset_kwargs: {{data_files: {{test: gone.jsonl}}}}\n")
    hub.write_text(f"task: hub\n{kind}dataset_path: nobody/nothing\ndataset_name: some\n")
    for args, said in (
        (("--tasks", "broken"), "failed in the task broken: KeyError: 'page'"),
        (("--tasks", "wrong"), "Cannot load the task wrong (--tasks): TemplateAssertionError"),
        (("--tasks", "local"), f"where dataset_kwargs of {local} names them"),
        (("--tasks", "hub"), "datasets.load_dataset('nobody/nothing', 'some')"),
        (("--tasks", "hub", "--include-path", tmp_path / "none"), "none is not a folder"),
    ):
        done = evaluate(run, *args, "--include-path", tmp_path)
        assert done.code == 1 and said in done.err, done
