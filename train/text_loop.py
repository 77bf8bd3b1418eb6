"""Training of the text tokenizer: the text of raw shards → SentencePiece → ``out``."""

from collections.abc import Iterator
from pathlib import Path

from plait.errors import PlaitError
from plait.tokenizers.text import TextTokenizer
from plait.train.documents import raw_parts
from plait.train.recipe import TextTokenizerRecipe
from plait.train.shards import read_samples


def train_text(recipe: TextTokenizerRecipe) -> TextTokenizer:
    """Run a recipe and return the tokenizer, written to ``recipe.out``.

    Raises:
        PlaitError: the folder cannot be made, or the shards' text is too little for the vocabulary.
    """
    tokenizer = TextTokenizer.train(shard_texts(recipe.shards), recipe.vocabulary_size)
    tokenizer.save_pretrained(recipe.out)
    return tokenizer


def shard_texts(folders: list[str]) -> Iterator[str]:
    """Every text part of the folders' samples; what is not UTF-8 is left out."""
    for folder in folders:
        for sample in read_samples(Path(folder)):
            try:
                parts, _, _ = raw_parts(sample)
                yield from (part.data.decode() for part in parts if part.modality == "text")
            except (PlaitError, UnicodeDecodeError) as error:
                print(f"skipped {sample['__key__']}: {error}", flush=True)
