"""What batches can be for: a data config says for which task its batches are, an objective from which it learns."""

NEXT_TOKENS = "next tokens"
"""What no corruption changes."""

WAYS: dict[str, str] = {
    NEXT_TOKENS: "Packed(...) or Mixture(...) without a corruption",
    "tokens after a prefix": "Packed(..., corruption=RandomPrefix())",
    "masked tokens": "Packed(..., corruption=TokenMasking()) or SpanMasking()",
    "masked tokens and sentence pairs": "Packed(..., corruption=NextSentence()) or SentenceOrder()",
    "permuted tokens": "Packed(..., corruption=FactorizationOrder())",
    "sequence to sequence": "Pairs(...), or Packed(..., corruption=SpanCorruption()) or Denoising()",
    "blanks": "Packed(..., corruption=Blanks())",
    "sentences": "Sentences(...)",
    "classes of texts": "LabelledTexts(...) or Docstrings()",
    "classes of tokens": "LabelledWords(...)",
    "answers in texts": "Questions(...)",
    "classes of images": "Digits() or Images(...)",
    "images and texts": "Digits(captions=True) or Images(..., caption=...)",
}
"""Task to the data configs whose batches are for it."""
