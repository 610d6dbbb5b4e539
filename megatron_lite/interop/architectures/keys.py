"""config.json reader: each key is used, known to be harmless, or refused by name; none is ignored silently."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.errors import CheckpointError

_ABSENT: Any = object()
OTHER_MODEL = "Import a model that was trained without this setting: the outputs of this one would be wrong"
DOWNLOAD = "Download config.json again"

HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("architectures", "model_type"), "chosen by, see registry.py"),
    **dict.fromkeys(("transformers_version", "_name_or_path", "_commit_hash"), "who wrote it"),
    **dict.fromkeys(("dtype", "torch_dtype"), "the tensors have their own dtypes"),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
        "which tokens begin and end a text is the tokenizer's business",
    ),
    **dict.fromkeys(
        (
            *("do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "max_length"),
            *("min_length", "max_new_tokens", "length_penalty", "repetition_penalty", "diversity_penalty"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping", "num_return_sequences"),
            *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
            *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "prefix"),
            *("return_dict_in_generate", "output_scores", "begin_suppress_tokens", "task_specific_params"),
        ),
        "settings of generation, not of the model",
    ),
    **dict.fromkeys(
        ("use_cache", "keys_to_ignore_at_inference", "gradient_checkpointing", "use_return_dict", "return_dict"),
        "how the program runs, not what it computes",
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "chunk_size_feed_forward"),
        "how the program runs, not what it computes",
    ),
    **dict.fromkeys(("_attn_implementation", "_attn_implementation_autoset", "tf_legacy_loss"), "choice of a kernel"),
    **dict.fromkeys(
        ("problem_type", "finetuning_task", "id2label", "label2id", "num_labels", "tokenizer_class"),
        "for classification heads and tokenizers",
    ),
    **dict.fromkeys(("initializer_range", "initializer_factor"), "initial values only"),
    **dict.fromkeys(("classifier_dropout", "classifier_dropout_prob"), "for classification heads"),
    **dict.fromkeys(("pretraining_tp",), "how many ranks trained it; the function is the same"),
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), "dropouts of training under BERT's names (GPT-NeoX)"
    ),
    **dict.fromkeys(("output_past", "_num_labels", "is_llama_config", "transformers.js_config"), "of other programs"),
    **dict.fromkeys(("base_model_tp_plan", "base_model_pp_plan", "tp_plan"), "parallel plans of transformers"),
}
"""Keys that any config.json may have and that do not change what the model computes, with the reason."""

REFUSED_UNLESS: Mapping[str, tuple[Collection[Any], str]] = {
    "is_decoder": ((True, False), ""),
    "is_encoder_decoder": ((False,), "an encoder"),
    "add_cross_attention": ((False,), "cross-attention"),
    "cross_attention_hidden_size": ((None,), "cross-attention"),
    "tie_encoder_decoder": ((False,), "an encoder"),
    "quantization_config": ((None,), "quantized weights"),
    "auto_map": ((None, {}), "code of its own"),
    "use_mrope": ((False,), "multimodal rotary positions"),
    "rope_interleaved": ((False,), "another order of rotary channels"),
    "pruned_heads": (({}, None), "pruned heads"),
}
"""Keys of any config.json whose other values are not supported, and what those mean."""


class ConfigKeys:
    """The keys of a config.json, each of which must be accounted for.

    Args:
        content: the JSON object.
        path: the file, for messages.
        seq_length: the longest sequence that the user wants (--seq-length); 0: all of the model's positions.
    """

    def __init__(self, content: Mapping[str, Any], path: Path, seq_length: int = 0) -> None:
        self.content = content
        self.path = path
        self.seq_length = seq_length
        self._seen: set[str] = set()

    def take(self, *names: str, default: Any = _ABSENT) -> Any:
        """Return the value of a key that is known under several names.

        Args:
            names: its spellings.
            default: the architecture's own default, for a config that leaves it out or says null.

        Raises:
            CheckpointError: it is missing and has no default, or two spellings contradict each other.
        """
        self._seen.update(names)
        given = {name: self.content[name] for name in names if self.content.get(name) is not None}
        if len(set(map(repr, given.values()))) > 1:
            raise CheckpointError(
                f"{self.path} gives one setting two different values: "
                f"{' and '.join(f'{name}={value!r}' for name, value in given.items())}",
                fix="Delete the wrong one of the two from the file: the published model has only one of these values",
            )
        if given:
            return next(iter(given.values()))
        if default is _ABSENT:
            raise CheckpointError(
                f"{self.path} does not state {' or '.join(names)}, which the model needs",
                fix="Download config.json again, or import another model if this one has no such setting",
            )
        return default

    def number(self, *names: str, default: Any = _ABSENT) -> int:
        """Return a positive whole number."""
        value = self.take(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unsupported(names[0], value, "a positive whole number is needed", fix=DOWNLOAD)
        return value

    def require(self, name: str, allowed: Collection[Any], meaning: str, *, default: Any) -> Any:
        """Return a setting of which only some values are supported.

        Raises:
            CheckpointError: it has another.
        """
        value = self.take(name, default=default)
        if value not in allowed:
            raise self.unsupported(name, value, meaning)
        return value

    def pass_over(self, *names: str) -> None:
        """Note keys of the architecture that change nothing."""
        self._seen.update(names)

    def finish(self, extra: Collection[str] = ()) -> None:
        """Account for all keys that were not asked for.

        Args:
            extra: keys that the user allows to be ignored.

        Raises:
            CheckpointError: one of them is unknown, or asks for what is not supported.
        """
        for name, (allowed, meaning) in REFUSED_UNLESS.items():
            if name not in self._seen and name in self.content and self.content[name] not in allowed:
                raise self.unsupported(name, self.content[name], f"there is no support for {meaning}")
        known = self._seen | HARMLESS.keys() | REFUSED_UNLESS.keys() | set(extra)
        unknown = sorted(name for name in self.content if name not in known and self.content[name] is not None)
        if unknown:
            raise CheckpointError(
                f"{self.path} has settings that this importer does not know: "
                f"{', '.join(f'{name}={self.content[name]!r}' for name in unknown)}",
                rule="An unknown setting may change what the model computes",
                fix="If these settings do not change the model's outputs, add --ignore-config-keys "
                f"{' '.join(unknown)}; otherwise import a model that was trained without them",
            )

    def unsupported(self, name: str, value: Any, because: str, *, fix: str = "") -> CheckpointError:
        """Return the error for a setting that this program's model cannot have; `fix` is for a damaged file."""
        return CheckpointError(f"{self.path} has {name}={value!r}: {because}", fix=fix or OTHER_MODEL)
