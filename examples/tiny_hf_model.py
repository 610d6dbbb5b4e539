"""Small random Llama with tokenizer in Hugging Face format, in place of a download."""

import argparse
import shutil
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(options.tokenizer / "tokenizer.json"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=len(tokenizer) - 1,
        eos_token_id=len(tokenizer) - 1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(options.folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(options.tokenizer / name, options.folder / name)


if __name__ == "__main__":
    main()
