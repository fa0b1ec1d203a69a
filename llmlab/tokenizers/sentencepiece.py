"""SentencePiece (Kudo and Richardson 2018, 1808.06226): pieces of text, spaces included, learnt from raw text.

Four models, from the same text:

    unigram  a probability for every piece; a text is cut so that their product is largest (Kudo 2018, 1804.10959).
             Slowest to train, usually the shortest sequences.
    bpe      starts from characters and merges the most frequent pair, again and again (Sennrich et al. 2016,
             1508.07909). Trains in a fraction of the time.
    char     one character, one piece.
    word     one word, one piece; everything else falls back to bytes. A baseline.

SentencePiece was made for prose: by default it rewrites characters (NFKC), drops tabs and newlines and squeezes runs of
spaces. Here it is set up to lose nothing, because the text may be source code: no normalisation, no invented leading
space, runs of spaces may be pieces (indentation is one token), newline is always a token, and a character that is not
in the vocabulary becomes its UTF-8 bytes. `decode(encode(text)) == text` for every text.

SentencePiece writes a space as '▁' (U+2581), and would read a '▁' of the text back as a space. For its own models
llmlab therefore writes that character as three bytes, and a space without a piece of its own as the byte 0x20.
"""

import io
import re
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmlab.tokenizers.base import Frame, Progress, Texts, Tokenizer, TokenizerConfig, conventional_frame
from llmlab.tokenizers.between import decode_between, encode_between
from llmlab.tokenizers.sampling import SMALLEST_SAMPLE, Sample, cut, sample_text
from llmlab.tokenizers.special import SpecialTokens
from llmlab.tokenizers.storage import load_tokenizer, read_model

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "▁"
# Characters that the trainer keeps for itself: it drops sentences with NUL or U+2585, and takes U+2581 for a space.
_RESERVED = ("\n", "\0", "▁", "▅")
# Longer sentences are silently left out of training, so ours are cut. 1,024 characters are at most 4,096 bytes.
_MAX_SENTENCE_CHARACTERS, _MAX_SENTENCE_BYTES = 1024, 4192
# A constant, not the number of cores: threads sum expected counts in parts, so their number changes the last bits of
# the sums and with them, now and then, a piece.
_TRAINING_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class SentencePiece(TokenizerConfig):
    """A SentencePiece model, trained on the run's own data or opened from a path."""

    vocab_size: int = 1024
    """Pieces, including special tokens, symbols and the 256 bytes."""
    kind: Literal["unigram", "bpe", "char", "word"] = "unigram"
    """The model: unigram (shortest sequences), bpe (fastest training), char, word."""
    path: str | None = None
    """Open this *.model file or directory instead of training; the other fields are then unused."""
    special: SpecialTokens = SpecialTokens(unk="<unk>")
    """The special tokens. A SentencePiece model always has an unknown token."""
    symbols: tuple[str, ...] = ("\n",)
    """Strings that are always one token, the longest first: for code, a newline with its indentation, say."""
    byte_fallback: bool = True
    """Spell what is not in the vocabulary in bytes; without it, that text is lost as the unknown token."""
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "identity"
    """How text is rewritten before it is cut; everything but identity loses something (cf: lower case)."""
    add_dummy_prefix: bool = False
    """Put a space before every text, so that its first word is spelled as inside a sentence."""
    collapse_whitespace: bool = False
    """Squeeze runs of spaces into one and strip both ends, for prose."""
    split_by_whitespace: bool = True
    """Keep pieces within a word and the space before it; without, 'in▁the' or '▁▁▁▁return' can be one piece."""
    split_digits: bool = False
    """Make every digit a token of its own, for arithmetic."""
    max_piece_length: int = 16
    """Characters of the longest piece."""
    character_coverage: float = 0.9995
    """Share of the text's characters that get a piece of their own; the rarest fall back to bytes."""
    max_training_bytes: int | None = 10_000_000
    """Train on a random sample of this size where there is more text; None for all of it."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        if self.special.unk is None:
            raise ValueError("a SentencePiece model always has an unknown token: name it, special.unk='<unk>'")
        if any(not symbol or _SPACE in symbol or symbol in self.special.tokens for symbol in self.symbols):
            raise ValueError(f"symbols={self.symbols} must be no special tokens, not empty, and without {_SPACE!r}")
        if not 0 < self.character_coverage <= 1:
            raise ValueError(f"character_coverage={self.character_coverage} is not above 0 and at most 1")
        if not 1 <= self.max_piece_length <= 512:
            raise ValueError(f"max_piece_length={self.max_piece_length} is not between 1 and 512")
        if self.max_training_bytes is not None and self.max_training_bytes < SMALLEST_SAMPLE:
            raise ValueError(f"max_training_bytes={self.max_training_bytes} is less than {SMALLEST_SAMPLE}")
        if self.path is None and self.vocab_size <= self.reserved:
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves no room for pieces: special tokens, symbols and bytes take "
                f"{self.reserved}; use at least {self.reserved + 1}, plus one for each character of the text"
            )

    @property
    def reserved(self) -> int:
        """Ids that are not learnt: special tokens, symbols, bytes."""
        return len(self.special.tokens) + len(self.symbols) + 256 * self.byte_fallback

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "SentencePieceTokenizer":
        """Trains on the texts, or opens `path`."""
        if self.path is not None:
            tokenizer = load_tokenizer(self.path)
            if not isinstance(tokenizer, SentencePieceTokenizer):
                raise ValueError(f"{self.path} is a {tokenizer.kind} tokenizer, not SentencePiece")
            return tokenizer
        if texts is None:
            raise ValueError("training a SentencePiece tokenizer needs texts; to open one, set its path")
        sample = sample_text(texts(), self.max_training_bytes, seed=self.seed, progress=progress)
        return SentencePieceTokenizer(_train(self, sample), self.special)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; `processor` is the library's own object."""

    kind: ClassVar[str] = "sentencepiece"
    model_file: ClassVar[str] = "tokenizer.model"

    def __init__(self, model: bytes, special: SpecialTokens | None = None) -> None:
        """`special` defaults to what the model and the names of its pieces say. Raises ValueError for a bad model."""
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self.processor = SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
            size = self.processor.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        if not model or size < 1:
            raise ValueError("not a SentencePiece model: it has no pieces")
        tokens = [self.processor.id_to_piece(index) for index in range(size)]
        super().__init__(tokens, special if special is not None else _guess_special(self.processor, tokens))
        byte_ids = {int(token[1:-1], 16): index for index, token in enumerate(tokens) if self.processor.is_byte(index)}
        self._hidden_ids = self.special_ids - {self.unk_id}
        self._space_id = byte_ids.get(0x20, -1)
        # The bytes of '▁', by which byte fallback spells both that character and, wrongly, a space without a piece.
        self._marker = [byte_ids[byte] for byte in _SPACE.encode()] if len(byte_ids) == 256 else []
        if not self._adds_up():
            self._marker = []

    @classmethod
    def open(cls, path: Path, special: SpecialTokens | None = None) -> "SentencePieceTokenizer":
        """Opens a *.model file. Raises ValueError, naming it, where it is damaged."""
        try:
            return cls(read_model(path), special)
        except ValueError as error:
            raise ValueError(f"{path} cannot be opened: {error}") from None

    def model_bytes(self) -> bytes:
        """The serialized model, as SentencePiece itself reads and writes it."""
        return self._model

    def _frame(self) -> Frame:
        return conventional_frame(self.special, self._ids)

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        special = {token: self._ids[token] for token in self.special.tokens} if parse_special_tokens else {}
        return encode_between(texts, special, self._encode_losslessly if self._marker else self._encode_natively)

    @property
    def hidden_ids(self) -> frozenset[int]:
        """All special tokens but unk, which stands for text that was lost and shows as the model spells it."""
        return self._hidden_ids

    def _encode_natively(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=_threads(texts)) if texts else []

    def _encode_losslessly(self, texts: list[str]) -> list[list[int]]:
        """Ids that decode to the text: '▁' in bytes, and a space that byte fallback spelled as '▁' as a space."""
        parts = [text.split(_SPACE) for text in texts]
        encoded = iter(self._encode_natively([part for row in parts for part in row]))
        rows: list[list[int]] = []
        for row in parts:
            ids = self._respell_spaces(next(encoded))
            for _ in row[1:]:
                ids += self._marker
                ids += self._respell_spaces(next(encoded))
            rows.append(ids)
        return rows

    def _respell_spaces(self, ids: list[int]) -> list[int]:
        """Replaces the three bytes of '▁', in a text that has none, by the byte of a space."""
        marker = self._marker
        if marker[0] not in ids:  # nearly always: byte 0xE2 begins no common character
            return ids
        result: list[int] = []
        for index in ids:
            result.append(index)
            if index == marker[2] and result[-3:] == marker:
                result[-3:] = [self._space_id]
        return result

    def _adds_up(self) -> bool:
        """Whether the ids of parts of a text, taken losslessly, are ids of the text, with all white space kept."""
        parts = ["x ", "x  y\n\t", " z  "]
        if not self._marker:
            return False
        ids = [index for row in self._encode_losslessly(parts) for index in row]
        return self._decode_natively([ids]) == ["".join(parts)]

    def _decode(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        special = {index: self._special_ids[index] for index in self.hidden_ids}
        return decode_between(batch, special, skip_special_tokens, self._decode_natively)

    def _decode_natively(self, rows: list[list[int]]) -> list[str]:
        return self.processor.decode(rows, num_threads=_threads(rows)) if rows else []


def _threads(batch: Sized) -> int:
    """All cores for a batch, none beside the caller's for a few texts: starting them takes about 0.2 ms."""
    return -1 if len(batch) > 8 else 1


def _guess_special(processor: "SentencePieceProcessor", tokens: list[str]) -> SpecialTokens:
    """The model's own bos, eos, pad and unk; other roles by the usual names of its control pieces."""
    control = tuple(token for index, token in enumerate(tokens) if processor.is_control(index))
    guessed = SpecialTokens.guess(frozenset(control), control).to_json()
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    roles = {**guessed, **{role: tokens[index] if index >= 0 else None for role, index in own.items()}}
    claimed = {token for role, token in roles.items() if role != "extra"}
    return SpecialTokens.from_json({**roles, "extra": [token for token in control if token not in claimed]})


def _train(config: SentencePiece, sample: Sample) -> bytes:
    """The serialized model."""
    from sentencepiece import SentencePieceTrainer

    special, model = config.special, io.BytesIO()
    roles = _roles(special)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(config, sample),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            control_symbols=[token for token in special.tokens if token not in roles.values()],
            user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in config.symbols],
            byte_fallback=config.byte_fallback,
            normalization_rule_name=config.normalization,
            add_dummy_prefix=config.add_dummy_prefix,
            remove_extra_whitespaces=config.collapse_whitespace,
            allow_whitespace_only_pieces=not config.collapse_whitespace,
            split_by_whitespace=config.split_by_whitespace,
            split_digits=config.split_digits,
            max_sentencepiece_length=config.max_piece_length,
            character_coverage=config.character_coverage,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
            **roles,
        )
    except RuntimeError as error:
        raise _explained(config, sample, str(error)) from None
    tokenizer = SentencePieceTokenizer(model.getvalue(), special)
    if tokenizer.vocab_size < config.vocab_size:  # char models end where the characters do, without a word
        raise _too_large(config, sample, tokenizer.vocab_size)
    return model.getvalue()


def _roles(special: SpecialTokens) -> dict[str, Any]:
    """The trainer's options for the roles that it knows; -1 is none. They get the first ids, unk the very first."""
    options: dict[str, Any] = {}
    claimed: list[str] = []
    for role in ("unk", "bos", "eos", "pad"):
        token = getattr(special, role)
        if token is None or token in claimed:  # a string with two roles is one piece; the manifest keeps both roles
            options[f"{role}_id"] = -1
        else:
            options |= {f"{role}_id": len(claimed), f"{role}_piece": token}
            claimed.append(token)
    return options


def _sentences(config: SentencePiece, sample: Sample) -> Iterator[str]:
    """The text between symbols and reserved characters, in parts short enough for the trainer."""
    stops = sorted({*config.symbols, *_RESERVED}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, stops)))
    for block in sample.blocks:
        for line in pattern.split(block):
            yield from cut(line, _MAX_SENTENCE_CHARACTERS, " ")


def _explained(config: SentencePiece, sample: Sample, message: str) -> Exception:
    """The trainer's error in terms of the config."""
    if found := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return _too_large(config, sample, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ValueError(
            f"vocab_size={config.vocab_size} is too small: special tokens, symbols, bytes and the characters of this "
            f"text take {found[1]}; use at least {found[1]}, or lower character_coverage={config.character_coverage}"
        )
    return RuntimeError(f"SentencePiece failed to train on {sample}: {message}")


def _too_large(config: SentencePiece, sample: Sample, largest: int) -> ValueError:
    return ValueError(
        f"vocab_size={config.vocab_size} is more than this corpus supports: {sample} with {config.kind!r} pieces give "
        f"at most {largest}; use vocab_size={largest}, or more text"
    )
