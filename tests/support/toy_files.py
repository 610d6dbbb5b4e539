"""Toy files that the commands of the documentation read: texts, tokenizers, datasets, runs and models.

Each is made once in a session and copied into the folder of a page under the names that the page uses.
"""

import functools
import gzip
import json
import random
import shutil

from support.trainer import command

SIZES = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--ffn-hidden-size", "64"),
    *("--seq-length", "128", "--max-position-embeddings", "128", "--micro-batch-size", "2", "--global-batch-size", "2"),
)
SHAPE = (
    *("--position-embedding-type", "rotary", "--normalization", "RMSNorm", "--activation", "swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
)
LETTERS = "abcdefghij"


class ToyFiles:
    """Maker of toy files; the run has the shape of a Llama.

    Args:
        folder: where the originals are made.
    """

    def __init__(self, folder):
        self.folder = folder
        self.root = str(folder)
        draw = random.Random(1234)
        words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 6))) for _ in range(60)]
        self.texts = [" ".join(draw.choices(words, k=draw.randint(10, 60))) for _ in range(120)]

    def make(self, kind, path):
        """Make a file or folder of a kind at a path; a dataset's path is its prefix."""
        path.parent.mkdir(parents=True, exist_ok=True)
        MAKERS[kind](self, path)

    def write_lines(self, path, records):
        """Write JSON lines."""
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def corpus(self, path):
        """Write lines with a text."""
        self.write_lines(path, ({"text": text} for text in self.texts))
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))

    def pairs(self, path):
        """Write lines with prompt and completion."""
        self.write_lines(path, ({"prompt": text[:20], "completion": text[20:]} for text in self.texts))

    def chats(self, path):
        """Write lines with messages."""
        ask, answer = (
            (lambda text: {"role": "user", "content": text}),
            (lambda text: {"role": "assistant", "content": text}),
        )
        self.write_lines(path, ({"messages": [ask(text[:20]), answer(text[20:])]} for text in self.texts))

    def prompts(self, path):
        """Write JSON lines with prompts for a .jsonl file, otherwise a prompt a line."""
        if path.suffix == ".jsonl":
            self.write_lines(path, [{"prompt": "Once upon", "max_new_tokens": 4}, {"prompt": "a b", "seed": 3}])
        else:
            path.write_text("Once upon\na b\n", encoding="utf-8")

    def text(self, path):
        """Write plain text; for LAMBADA's .jsonl, passages; for WikiText, a heading, too."""
        if path.suffix == ".jsonl":
            self.corpus(path)
        else:
            heading = " = Robert Boulter = \n" if path.name.startswith("wiki") else ""
            path.write_text(heading + "\n".join(self.texts[:20]) + "\n", encoding="utf-8")

    def template(self, path):
        """Write a chat template."""
        path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}", encoding="utf-8")

    def script(self, path):
        """Write a program that does nothing."""
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)

    def texts_in(self, path):
        """Write a folder of text files."""
        path.mkdir()
        for number, text in enumerate(self.texts):
            (path / f"{number}.txt").write_text(text, encoding="utf-8")

    @functools.cached_property
    def tokenizer(self):
        """Train a tokenizer; its folder also has the files of GPT-2's."""
        source = self.folder / "corpus.jsonl"
        self.corpus(source)
        _run("train-tokenizer", "--input", source, "--output", self.folder / "tokenizer", "--vocab-size", 300)
        return self.folder / "tokenizer"

    @functools.cached_property
    def dataset(self):
        """Preprocess the corpus; return the prefix."""
        prefix = self.folder / "toy"
        _run(
            *("preprocess", "--input", self.tokenizer.parent / "corpus.jsonl", "--output-prefix", prefix),
            *("--tokenizer-model", self.tokenizer, "--append-eod"),
        )
        return f"{prefix}_text_document"

    def job(self, shape=SHAPE):
        """Return the flags of a training run at toy size, without its folders."""
        return (
            *("--data-path", str(self.dataset), "--split", "80,10,10", *SIZES, *shape),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer)),
            *("--train-iters", "4", "--lr", "1e-3", "--eval-iters", "1", "--device", "cpu", "--num-threads", "1"),
        )

    @functools.cached_property
    def run(self):
        """Train for 4 iterations with 2 checkpoints."""
        _run("train", *self.job(), "--save", self.folder / "run", "--save-interval", 2, "--weights-only-every", 2)
        return self.folder / "run"

    @functools.cached_property
    def gpt2(self):
        """Train a GPT-2, which every exporter supports."""
        _run("train", *self.job(shape=()), "--save", self.folder / "gpt2", "--save-interval", 4)
        return self.folder / "gpt2"

    @functools.cached_property
    def gpt580m(self):
        """Train a model of the preset gpt-580m."""
        shape = ("--preset", "gpt-580m")
        _run("train", *self.job(shape), "--save", self.folder / "gpt580m", "--save-interval", 4)
        return self.folder / "gpt580m"

    @functools.cached_property
    def qwen2(self):
        """Export a model of the preset qwen2-0.5b to Hugging Face."""
        _run("train", *self.job(("--preset", "qwen2-0.5b")), "--save", self.folder / "qwen2-run", "--save-interval", 4)
        _run("export", self.folder / "qwen2-run", "--output", self.folder / "qwen2", "--no-verify")
        return self.folder / "qwen2"

    @functools.cached_property
    def algpt2(self):
        """Export a model of shared layers to Hugging Face."""
        _run("train", *self.job(("--share-layers", "all")), "--save", self.folder / "shared", "--save-interval", 4)
        _run("export", self.folder / "shared", "--output", self.folder / "algpt2", "--no-verify")
        return self.folder / "algpt2"

    def questions(self, path):
        """Write lines with question, choices and the index of the right one."""
        choices = [" a", " b"]
        self.write_lines(path, ({"question": text[:20], "choices": choices, "label": 0} for text in self.texts[:4]))

    def exclude(self, path):
        """Write an exclude file with the host NODE."""
        path.write_text("NODE  # by hand\n", encoding="utf-8")

    @functools.cached_property
    def model(self):
        """Export the run to Hugging Face."""
        _run("export", self.run, "--output", self.folder / "model", "--no-verify")
        return self.folder / "model"

    @functools.cached_property
    def megatron(self):
        """Export the GPT-2 to Megatron-LM."""
        _run("export", self.gpt2, "--output", self.folder / "megatron", "--to", "megatron")
        return self.folder / "megatron"

    def copy_dataset(self, path):
        """Copy the files of the dataset to another prefix."""
        for suffix in (".bin", ".idx", ".manifest.json"):
            shutil.copyfile(f"{self.dataset}{suffix}", f"{path}{suffix}")


def _run(*args):
    result = command(*args)
    assert result.code == 0, (args, result.err)


def _copied(name):
    def copy(files, path):
        shutil.copytree(getattr(files, name), path)

    return copy


def _copied_file(name):
    def copy(files, path):
        shutil.copyfile(files.tokenizer / name, path)

    return copy


MAKERS = {
    "corpus": ToyFiles.corpus,
    "pairs": ToyFiles.pairs,
    "chats": ToyFiles.chats,
    "prompts": ToyFiles.prompts,
    "text": ToyFiles.text,
    "template": ToyFiles.template,
    "script": ToyFiles.script,
    "texts": ToyFiles.texts_in,
    "dataset": ToyFiles.copy_dataset,
    "tokenizer": _copied("tokenizer"),
    "vocabulary": _copied_file("vocab.json"),
    "merges": _copied_file("merges.txt"),
    "run": _copied("run"),
    "gpt2": _copied("gpt2"),
    "gpt580m": _copied("gpt580m"),
    "algpt2": _copied("algpt2"),
    "model": _copied("model"),
    "qwen2": _copied("qwen2"),
    "exclude": ToyFiles.exclude,
    "questions": ToyFiles.questions,
    "remove": lambda files, path: shutil.rmtree(path),
    "megatron": _copied("megatron"),
    "folder": lambda files, path: path.mkdir(),
}
