"""The word-level tokenizer of the shapes world, as an ordinary fast tokenizer of transformers."""

from collections.abc import Sequence
from typing import Any

from visionsel.data.shapes import vocabulary

__all__ = ["PAD", "SPECIAL", "build_tokenizer"]

PAD, BEGIN, END, UNKNOWN, IMAGE, USER, ASSISTANT = SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<user>",
    "<assistant>",
)


def build_tokenizer(words: Sequence[str] | None = None, padding_side: str = "left") -> Any:
    """A `PreTrainedTokenizerFast` over words and punctuation marks in lower case.

    Text is split as `visionsel.data.shapes.split_words` splits it; a word that is not in the vocabulary
    becomes `<unk>`. Decoding joins the words with spaces, punctuation marks without.

    Args:
        words: the vocabulary after the special tokens; default that of the shapes world.
        padding_side: "left", as generation needs it, or "right".

    Raises:
        ImportError: without the extra "multimodal".
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError('the tokenizer needs transformers: pip install "visionsel[multimodal]"') from error
    vocabulary_ = {word: i for i, word in enumerate([*SPECIAL, *(vocabulary() if words is None else words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary_, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(r"[a-z]+|[0-9]+|[^\sa-z0-9]"), "isolated"),
        ]
    )
    # joins with spaces, none before a punctuation mark; no word here begins with its prefix
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
