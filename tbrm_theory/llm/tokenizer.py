"""A tokenizer made in code, one token for each character: small models train from scratch, and nothing is downloaded.

Its two special tokens are single characters, too, that no text of a task contains: ``␀`` pads, ``␄`` ends. A character outside the
alphabet is an error, not an unknown token: a model would be asked to answer what it cannot read.
"""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tbrm_theory.errors import InvalidInputError

__all__ = ["END", "PAD", "PRINTABLE", "character_tokenizer", "check_readable"]

PAD, END = "␀", "␄"
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n→"
"""What every task can be written in: printable ASCII, the line break, and the arrow of ``quantum_lock``."""


def character_tokenizer(alphabet: str = PRINTABLE) -> PreTrainedTokenizerFast:
    """Token 0 pads, token 1 ends a response, then the characters of ``alphabet`` in its order.

    Prompts are padded on the left, so that responses begin at one position.
    """
    if not alphabet or len(set(alphabet)) < len(alphabet):
        raise InvalidInputError("alphabet", "expected characters, each of them once")
    if {PAD, END} & set(alphabet):
        raise InvalidInputError("alphabet", f"{PAD} and {END} are the special tokens")
    characters = models.WordLevel({token: i for i, token in enumerate((PAD, END, *alphabet))})
    tokenizer = Tokenizer(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_readable(alphabet: str, texts: Iterable[str]) -> None:
    """Refuse texts with a character that ``alphabet`` lacks."""
    known = set(alphabet)
    for number, text in enumerate(texts):
        if missing := set(text) - known:
            raise InvalidInputError(f"texts[{number}]", f"{min(missing)!r} is not in the alphabet of the tokenizer")
