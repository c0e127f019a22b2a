"""Sources of text, tokenizers, packed windows and the batches served from them."""

from moe_jax.data.batches import batches, evaluation_batches
from moe_jax.data.cache import default_directory
from moe_jax.data.corpus import Corpus
from moe_jax.data.documents import Document, Source
from moe_jax.data.text import Folder, Tfds
from moe_jax.data.tokenizers import Bytes, SentencePiece, Tokenizer, TokenizerConfig
from moe_jax.data.windows import Batch, Windows, batch, prepare

SOURCES = (Corpus, Folder, Tfds)
TOKENIZERS = (Bytes, SentencePiece)

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "Batch",
    "Bytes",
    "Corpus",
    "Document",
    "Folder",
    "SentencePiece",
    "Source",
    "Tfds",
    "Tokenizer",
    "TokenizerConfig",
    "Windows",
    "batch",
    "batches",
    "default_directory",
    "evaluation_batches",
    "prepare",
]
