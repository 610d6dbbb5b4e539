"""Flag entries: datasets, blend, split and tokenizer."""

from __future__ import annotations

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.structured import (
    read_groups,
    read_named_group,
    read_sources,
    read_split,
    write_groups,
    write_sources,
)

_SPLITS = ("train", "valid", "test")
_GROUPS = 'Blend of the {0} data: "NAME: WEIGHT START:END PATH, WEIGHT START:END PATH" (weight auto: by size).'
_GROUPS_FILE = "The same from a file: one line of groups, each in double quotes."
_BLEND = "Blend of the {0} data, as for --data-path, used whole."

DATA = (
    Flag(
        "--data-path",
        "data.sources",
        "Prefixes of .bin/.idx pairs, each after its weight or without weights.",
        words="any",
        read=read_sources,
        write=write_sources,
        metavar="[WEIGHT] PATH …",
        example="0.3 data/a_text_document 0.7 data/b_text_document",
    ),
    Flag(
        "--data-args-path",
        "command.data_args_path",
        "A file that holds the words of --data-path.",
        metavar="FILE",
    ),
    Flag(
        "--split",
        "data.split",
        "Shares of training, validation and test documents.",
        words="some",
        read=read_split,
        write=lambda split: [split],
        metavar="TRAIN,VALID,TEST",
        example="949,50,1",
    ),
    *(
        Flag(
            f"--{split}-weighted-split-paths",
            f"data.{split}_groups",
            _GROUPS.format(split),
            words="any",
            read=read_groups,
            write=write_groups,
            metavar='"GROUP" …',
            example=f"'{split}: 0.3 0:0.9 data/a_text_document, 0.7 0:0.9 data/b_text_document'",
        )
        for split in _SPLITS
    ),
    *(
        Flag(
            f"--{split}-weighted-split-paths-path",
            f"command.{split}_groups_path",
            _GROUPS_FILE,
            metavar="FILE",
        )
        for split in _SPLITS
    ),
    *(
        Flag(
            f"--{split}-data-path",
            f"data.{split}_groups",
            _BLEND.format(split),
            words="some",
            read=read_named_group(split),
            metavar="[WEIGHT] PATH …",
            example="0.3 data/a_text_document 0.7 data/b_text_document",
        )
        for split in _SPLITS
    ),
    Flag("--mock-data", "data.mock", "Random tokens instead of a dataset.", sets=True),
    Flag(
        "--data-index",
        "data.index_order",
        "Whose order of samples: Megatron-DeepSpeed's (legacy) or Megatron-LM's (modern).",
    ),
    Flag(
        "--document-sampling",
        "data.sampling",
        "Documents end to end, cut into samples; or one random slice of each document an epoch.",
    ),
    Flag("--data-cache-path", "data.cache_path", "Folder of the index cache (beside the data if not given)."),
    Flag(
        "--dataloader-type",
        "data.sampler",
        "Samples in order, or epoch after epoch in a new order.",
    ),
    Flag("--eod-mask-loss", "data.eod_mask_loss", "No loss at end-of-document tokens.", sets=True),
    Flag("--reset-position-ids", "data.reset_position_ids", "Positions start again after each document.", sets=True),
    Flag(
        "--reset-attention-mask",
        "data.reset_attention_mask",
        "No attention across the end of a document; takes a mask in memory only with ALiBi.",
        sets=True,
    ),
    Flag("--prefetch-microbatches", "data.prefetch", "Micro-batches read ahead (0: none)."),
)

TOKENIZER = (
    Flag(
        "--tokenizer-type",
        "tokenizer.type",
        "Kind of the tokenizer.",
        spellings={
            "PretrainedFromHF": "HuggingFaceTokenizer",
            "HFTokenizer": "HuggingFaceTokenizer",
            "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
            "Llama2Tokenizer": "SentencePieceTokenizer",
        },
    ),
    Flag(
        "--tokenizer-model",
        "tokenizer.model",
        "Its file or folder: tokenizer.json, a Hugging Face folder, or a sentencepiece .model.",
        aliases=("--tokenizer-name-or-path",),
        metavar="PATH",
    ),
    Flag("--vocab-file", "tokenizer.vocab_file", "vocab.json of a GPT-2 BPE.", aliases=("--vocab",), metavar="FILE"),
    Flag(
        "--merge-file", "tokenizer.merge_file", "merges.txt of a GPT-2 BPE.", aliases=("--merges-file",), metavar="FILE"
    ),
    Flag(
        "--vocab-size",
        "tokenizer.vocab_size",
        "Entries of a NullTokenizer before its end-of-document token.",
        most=2**31 - 2,
    ),
    Flag(
        "--vocab-extra-ids", "tokenizer.vocab_extra_ids", "Additional entries at the end of the vocabulary.", most=10**6
    ),
    Flag("--eod-token", "tokenizer.eod_token", "Name of the token that ends a document, where its files do not say."),
    Flag("--no-fast-tokenizer", "tokenizer.fast", "Encode with the tokenizer's own library only.", sets=False),
)
