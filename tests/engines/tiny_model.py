"""A Qwen2 with random weights and a byte tokenizer: vLLM loads it; its text means nothing."""

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
CONTEXT = 2048
_SPECIAL = ("<pad>", "<eos>", "<im>")
# In the order of the byte tokenizer's alphabet: first those that are printed as they are.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = (*_PRINTED, *(byte for byte in range(256) if byte not in _PRINTED))


def write_tiny_model(folder: Path) -> Path:
    """Write checkpoint and tokenizer into the folder and return it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = _write_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():  # large enough that the text is not one character for ever
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
    model.bfloat16().save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<im>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def byte_tokens(text: str) -> list[int]:
    """Tokens of the tiny model for a text, one for each byte."""
    return [len(_SPECIAL) + _BYTES.index(byte) for byte in text.encode()]
