"""Reference logits subprocess: runs a Hugging Face folder with the transformers library, prints differences.

    python -m megatron_lite.interop.transformers_logits FOLDER REQUEST

REQUEST is a folder with tokens.npy, expected.npy and tokenizer.json; the result goes to its result.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_lite.interop.modeling_files import has_own_code


def main(argv: list[str]) -> int:
    """Compare, and write the result."""
    folder, request = map(Path, argv)
    (request / "result.json").write_text(json.dumps(compare(folder, request)), encoding="utf-8")
    return 0


def compare(folder: Path, request: Path) -> dict[str, Any]:
    """Return the differences between transformers and what is expected.

    Args:
        folder: the model's.
        request: tokens.npy [b, s]; expected.npy [b, s, V], of which transformers may have more columns; texts.json:
            {"text": …, "ids": […]} or null.

    Returns:
        `largest` difference of the logits, `scale`: the largest logit, `problem`: why it does not load, or null,
        `tokenizer`: how its tokenizer differs, or null.
    """
    tokens = torch.from_numpy(np.load(request / "tokens.npy"))
    expected = torch.from_numpy(np.load(request / "expected.npy"))

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, problem = load(folder)
    if problem:
        return {"largest": None, "scale": None, "problem": problem, "tokenizer": None}
    found = logits(model, tokens)[..., : expected.shape[-1]]
    text = json.loads((request / "text.json").read_text(encoding="utf-8"))
    return {
        "largest": float((found - expected).abs().max()),
        "scale": float(expected.abs().max()),
        "problem": None,
        "tokenizer": None if text is None else compare_tokenizer(folder, text["text"], text["ids"]),
    }


def load(folder: Path) -> tuple[Any, str]:
    """Return the model as AutoModelForCausalLM loads it, its weights memory-mapped, and what is wrong with it."""
    import transformers

    # transformers 5 renamed torch_dtype; its old name is still read.
    key = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=has_own_code(folder),
        **{key: "auto"},
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            return model, f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, info[kind]))[:5])}"
    return model.eval(), ""


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Return the logits in fp32, whatever the weights' dtype, one module's weights converted at a time."""
    with computing_in_fp32(model):
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.float()


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """While entered, each module's own parameters are fp32 during its forward."""
    kept: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        kept[id(module)] = [(param, param.data) for param in module.parameters(recurse=False)]
        for param in module.parameters(recurse=False):
            param.data = param.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for param, data in kept.pop(id(module)):
            param.data = data

    handles = []
    for module in model.modules():
        if any(param.dtype != torch.float32 for param in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare_tokenizer(folder: Path, text: str, ids: list[int]) -> str | None:
    """Return how AutoTokenizer's ids of a text differ from the run's tokenizer's; None: they do not."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=has_own_code(folder)
        )
        found = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    except Exception as error:  # whatever a tokenizer's files make of it
        return f"it does not load ({type(error).__name__}: {error})"
    if found == ids:
        return None
    first = next((number for number, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), -1)
    return f"{len(found)} tokens instead of {len(ids)}, the first difference at {first}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
