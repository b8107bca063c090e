"""A tiny random encoder and traces whose outcome the text tells: real code, seconds to train."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from chimera_predictors.encoder import Encoder, load_encoder

WORDS = ("difficult", "proof", "simple", "sum", "number", "of", "observation", "a", "the")
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"0123456789")


def make_encoder(folder: Path) -> Encoder:
    """A BERT of one layer, 16 wide, over a vocabulary of few words, written to `folder`."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate((*MARKS, *WORDS))}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_encoder(str(folder), max_tokens=32)
