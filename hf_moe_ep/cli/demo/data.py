"""Real English text that needs no network: `pydoc_data.topics`, a part of every CPython.
`documents` gives its chapters, `train_tokenizer` makes a small byte-level BPE from them."""

from collections.abc import Sequence

END_OF_TEXT = "<|endoftext|>"


def documents() -> list[str]:
    """The chapters of Python's manual, ordered by name: 79 of them, 465 KB, in Python 3.11."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def train_tokenizer(texts: Sequence[str], vocab_size: int):
    """A byte-level BPE of at most `vocab_size` tokens, trained on `texts`; it encodes any text.

    Returns a PreTrainedTokenizerFast whose end-of-sequence and padding token is `END_OF_TEXT`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
