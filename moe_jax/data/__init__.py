"""Sources of text, tokenizers, packed windows and the batches served from them."""

from moe_jax.data.batches import batches, evaluation_batches
from moe_jax.data.cache import default_directory
from moe_jax.data.corpus import Corpus
from moe_jax.data.documents import Document, Source
from moe_jax.data.identity import data_identity, keep_tokenizers, with_kept_tokenizers
from moe_jax.data.images import Classification, Digits, Images, TfdsImages
from moe_jax.data.objectives import NextToken
from moe_jax.data.pairs import Pairs, Translation
from moe_jax.data.preparation import SERIAL, Limited, Preparation, Progress
from moe_jax.data.spans import SpanCorruption
from moe_jax.data.terms import Terms, cross_entropy, predictions
from moe_jax.data.text import Folder, Tfds
from moe_jax.data.tokenizers import Bytes, SentencePiece, Tokenizer, TokenizerConfig
from moe_jax.data.translation import Parallel, TfdsPairs, ToyTranslation
from moe_jax.data.windows import Batch, Windows, batch, prepare

SOURCES = (Corpus, Folder, Tfds, Parallel, TfdsPairs, ToyTranslation, Digits, TfdsImages)
OBJECTIVES = (NextToken, SpanCorruption, Translation, Classification)
TOKENIZERS = (Bytes, SentencePiece)

AnyBatch = Batch | Pairs | Images

__all__ = [
    "OBJECTIVES",
    "SERIAL",
    "SOURCES",
    "TOKENIZERS",
    "AnyBatch",
    "Batch",
    "Bytes",
    "Classification",
    "Corpus",
    "Digits",
    "Document",
    "Folder",
    "Images",
    "Limited",
    "NextToken",
    "Pairs",
    "Parallel",
    "Preparation",
    "Progress",
    "SentencePiece",
    "Source",
    "SpanCorruption",
    "Terms",
    "Tfds",
    "TfdsImages",
    "TfdsPairs",
    "Tokenizer",
    "TokenizerConfig",
    "ToyTranslation",
    "Translation",
    "Windows",
    "batch",
    "batches",
    "cross_entropy",
    "data_identity",
    "default_directory",
    "evaluation_batches",
    "keep_tokenizers",
    "predictions",
    "prepare",
    "with_kept_tokenizers",
]
