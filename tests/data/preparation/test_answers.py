"""Prompts with answers: loss masks of pairs and chats, chat templates, control codes, bad lines and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.loss_mask import has_mask, mask_prefix
from megatron_lite.data.format.manifest import check_files, read_manifest
from megatron_lite.data.preparation.chat import TemplateError, read_template
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.build import build_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "mat"},
    {"role": "assistant", "content": "number <1>"},
]


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    """A tokenizer.json with special tokens and a template."""
    library = tokenizers.Tokenizer.from_file(str(Path(tokenizer.vocab_file).with_name("tokenizer.json")))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|cat|>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    declared = {"eos_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))


@pytest.fixture
def lines(tmp_path):
    """Return a function that writes JSON lines and returns their path."""

    def write(*entries):
        path = tmp_path / "input.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return (str(path),)

    return write


def masked(prefix, encoder):
    """Return each document as (text, is answer) pairs of consecutive tokens with the same mask."""
    data, mask = IndexedDataset(prefix), IndexedDataset(mask_prefix(prefix))
    for path in (prefix, mask_prefix(prefix)):
        check_files(path, read_manifest(path))
    found = []
    for number in range(data.num_documents):
        tokens, own = data.document(number).tolist(), mask.document(number).tolist()
        runs = []
        for token, value in zip(tokens, own, strict=True):
            if not runs or runs[-1][1] != value:
                runs.append([[], value])
            runs[-1][0].append(token)
        found.append([(encoder.decode(ids), value) for ids, value in runs])
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_pairs(make, lines, chat_tokenizer, shuffle):
    pairs = [{"prompt": f"the cat number {i}:", "completion": f" mat {i}"} for i in range(50)]
    given = lines(*pairs, {"prompt": "", "completion": "sat"}, {"prompt": "the cat", "completion": "mat<|endoftext|>"})
    settings = {"inputs": given, "tokenizer": chat_tokenizer, "append_eod": True, "shuffle": shuffle, "unit_bytes": 900}
    prefix = make(input_format="prompt-completion", control_code="<|cat|>", prepend_eod=True, **settings)
    found = masked(f"{prefix}_completion_document", build_tokenizer(chat_tokenizer))
    start, end = "<|endoftext|><|cat|>", "<|endoftext|>"
    expected = [[(f"{start}{pair['prompt']}", 0), (f"{pair['completion']}{end}", 1)] for pair in pairs]
    # The first token of a document is predicted from the document before it.
    expected += [[(f"{start}s", 0), (f"at{end}", 1)], [(f"{start}the cat", 0), (f"mat{end}", 1)]]
    assert sorted(map(str, found)) == sorted(map(str, expected)) if shuffle else found == expected
    manifest = read_manifest(f"{prefix}_completion_document")
    assert manifest.tokenizer["control_code"] == "<|cat|>"
    assert manifest.report["documents"] == 52


def test_the_output_is_independent_of_units(make, lines, chat_tokenizer, look):
    given = lines(*({"question": f"cat {i}", "answer": "mat " * (i % 5 + 1)} for i in range(40)))
    settings = {"inputs": given, "tokenizer": chat_tokenizer, "input_format": "prompt-completion"}
    settings |= {"json_keys": ("question", "answer"), "min_tokens": 3}
    one, other = make("one", unit_bytes=300, **settings), make("other", **settings)
    for suffix in ("_answer_document", "_answer_document_loss_mask"):
        assert look.files(one, suffix)[:2] == look.files(other, suffix)[:2]


def test_chats(make, lines, chat_tokenizer):
    given = lines({"messages": CHAT}, {"messages": [*CHAT, {"role": "user", "content": "cat"}]})
    prefix = make(inputs=given, tokenizer=chat_tokenizer, input_format="chat", append_eod=True)
    found = masked(f"{prefix}_messages_document", build_tokenizer(chat_tokenizer))
    begin = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    expected = [(begin, 0), ("sat on<|im_end|>", 1)]
    expected.append(("\n<|im_start|>user\nmat<|im_end|>\n<|im_start|>assistant\n", 0))
    assert found[0] == [*expected, ("number <1><|im_end|>", 1), ("\n<|endoftext|>", 0)]
    assert found[1][3:] == [
        ("number <1><|im_end|>", 1),
        ("\n<|im_start|>user\ncat<|im_end|>\n<|endoftext|>", 0),
    ]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|endoftext|>\n", [("mat", 0), ("sat on<|endoftext|>", 1), ("\n<|endoftext|>", 0)]),
        ("<|endoftext|>", [("mat", 0), ("sat on<|endoftext|>", 1)]),
        (" <|im_end|>\n<|endoftext|>", [("mat", 0), ("sat on <|im_end|>", 1), ("\n<|endoftext|>", 0)]),
        ("\n", [("mat", 0), ("sat on\n<|endoftext|>", 1)]),
    ],
)
def test_the_answer_ends_with_its_mark(make, lines, chat_tokenizer, tmp_path, end, expected):
    template = tmp_path / "template.jinja"
    end = end.replace("\n", "{{ '\\n' }}")
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + end + "{% endif %}{% endfor %}"
    )
    given = lines({"messages": [{"role": "user", "content": "mat"}, CHAT[1]]})
    settings = {"inputs": given, "tokenizer": chat_tokenizer, "input_format": "chat", "append_eod": True}
    prefix = make(chat_template=str(template), **settings)
    assert masked(f"{prefix}_messages_document", build_tokenizer(chat_tokenizer)) == [expected]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"prompt": "a"}, "no key 'completion'"),
        ({"prompt": "a", "completion": None}, "the value of 'completion' is null, not a string"),
        ({"prompt": "a", "completion": " "}, "the answer under 'completion' is empty"),
    ],
)
def test_bad_pairs(make, lines, chat_tokenizer, entry, problem):
    with pytest.raises(DataError, match=problem):
        make(inputs=lines(entry), tokenizer=chat_tokenizer, input_format="prompt-completion")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "the value of 'messages' is not a list of messages with role and content"),
        (CHAT[:1], "no message of the role 'assistant'"),
        ([{"role": "assistant"}], "the chat template fails: .*content"),
        ([{"role": "assistant", "content": ""}], "the answer in message 1 is empty"),
        ([{"role": "refused", "content": ""}], "refused by the chat template: no such role"),
    ],
)
def test_bad_chats(make, lines, chat_tokenizer, tmp_path, messages, problem):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
        "{{ m.role + m.content }}{% endfor %}"
    )
    settings = {"tokenizer": chat_tokenizer, "input_format": "chat", "chat_template": str(template)}
    with pytest.raises(DataError, match=f"Bad line .*input.jsonl:1: .*{problem}"):
        make(inputs=lines({"messages": messages}), **settings)
    make(inputs=lines({"messages": messages}, {"messages": CHAT}), skip_bad_lines=True, **settings)


def test_templates(chat_tokenizer, tmp_path):
    folder = Path(chat_tokenizer.model)
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="renders message 2 differently in a longer chat"):
        read_template(chat_tokenizer.model).segments(CHAT)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"The chat template .* cannot be parsed"):
        read_template(chat_tokenizer.model)
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}{{ eos_token }}")
    assert read_template(chat_tokenizer.model)._render([{"a": "<é>"}], prompt=False) == '[{"a": "<é>"}]<|endoftext|>'
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"has no chat template \(chat_template.jinja, or chat_template in"):
        read_template(chat_tokenizer.model)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"input_format": "chat", "json_keys": ("a", "b")},
            "--json-keys a b names 2 keys",
        ),
        (
            {"input_format": "chat", "split_sentences": True},
            "--split-sentences cannot be combined with",
        ),
        (
            {"input_format": "chat", "plain_text": "file"},
            "--plain-text file cannot be combined with",
        ),
        ({"chat_template": "x"}, "--chat-template x has no effect without --input-format chat"),
    ],
)
def test_options_that_do_not_fit(tokenizer, options, problem):
    with pytest.raises(ConfigError, match=problem):
        PreprocessOptions(inputs=("x",), output_prefix="y", tokenizer=tokenizer, **options)


def test_a_text_dataset_replaces_a_mask(make, lines, chat_tokenizer):
    given = lines({"prompt": "the", "completion": "cat"})
    settings = {"inputs": given, "tokenizer": chat_tokenizer, "overwrite": True}
    prefix = f"{make(input_format='prompt-completion', **settings)}_completion_document"
    assert has_mask(prefix)
    make(json_keys=("completion",), **settings)
    assert not has_mask(prefix)
