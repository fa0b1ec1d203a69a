"""The Hugging Face `tokenizers` library: open any tokenizer.json, train byte-level BPE and WordPiece.

Byte-level BPE (Radford et al. 2019, GPT-2) merges bytes instead of characters, within words that a regular expression
cuts: it knows every text from 256 symbols and loses none of it. WordPiece (Schuster and Nakajima 2012; Devlin et al.
2018, 1810.04805) lower-cases, splits at punctuation and takes the longest known prefix, again and again; a word with an
unknown character is [UNK]. The first is the decoder's usual choice, the second the encoder's.

A tokenizer.json is kept byte for byte, so that its fingerprint does not depend on the library's version; padding and
truncation that it asks for are not applied, since both are arguments here.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmlab.tokenizers.base import (
    Frame,
    Progress,
    Texts,
    Tokenizer,
    TokenizerConfig,
    conventional_frame,
    require_unicode,
)
from llmlab.tokenizers.sampling import SMALLEST_SAMPLE, Sample, sample_text
from llmlab.tokenizers.special import ROLES, SpecialTokens
from llmlab.tokenizers.storage import load_tokenizer, read_model

if TYPE_CHECKING:
    import tokenizers

# Files of a Hugging Face directory that say more about the tokenizer; they travel with it unread, but for the roles.
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_COMPANIONS = (_CONFIG, _MAP, "chat_template.jinja")
_CONTINUING = "##"  # WordPiece writes a piece inside a word like this


@dataclass(frozen=True, kw_only=True)
class HuggingFace(TokenizerConfig):
    """A tokenizer of the Hugging Face library, opened from a path."""

    path: str
    """A tokenizer.json, or a directory that holds one."""

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "HuggingFaceTokenizer":
        """Opens the path; there is nothing to train."""
        tokenizer = load_tokenizer(self.path)
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError(f"{self.path} is a {tokenizer.kind} tokenizer, not one of the tokenizers library")
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class ByteLevelBPE(TokenizerConfig):
    """Byte-level byte-pair encoding, as GPT-2 has it."""

    vocab_size: int = 8192
    """Tokens, including special ones and the 256 bytes."""
    special: SpecialTokens = SpecialTokens()
    """The special tokens, which get the first ids."""
    min_frequency: int = 2
    """A pair that occurs less often is not merged."""
    add_prefix_space: bool = False
    """Put a space before every text, so that its first word is spelled as inside a sentence."""
    max_training_bytes: int | None = 50_000_000
    """Train on a random sample of this size where there is more text; None for all of it."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        _check_training(self.vocab_size, len(self.special.tokens) + 256, self.max_training_bytes)

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "HuggingFaceTokenizer":
        """Trains on the texts."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        sample = _sample(texts, self.max_training_bytes, self.seed, progress)
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=self.add_prefix_space)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=list(self.special.tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        _fit(library, sample, trainer, self.vocab_size, self.min_frequency)
        return _finished(library, self.special)


@dataclass(frozen=True, kw_only=True)
class WordPiece(TokenizerConfig):
    """WordPiece, as BERT has it. It loses white space, and case where it lower-cases."""

    vocab_size: int = 8192
    """Tokens, including special ones and twice the alphabet: each character begins a word or goes on in one."""
    special: SpecialTokens = SpecialTokens(
        bos=None, eos=None, pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]"
    )
    """The special tokens, which get the first ids."""
    lowercase: bool = True
    """Lower-case the text and strip accents."""
    alphabet_size: int = 1000
    """Keep this many different characters, the most frequent; a word with another one is unknown."""
    min_frequency: int = 2
    """A pair that occurs less often is not merged."""
    max_training_bytes: int | None = 50_000_000
    """Train on a random sample of this size where there is more text; None for all of it."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        if self.special.unk is None:
            raise ValueError("WordPiece needs a token for unknown words: name it, special.unk='[UNK]'")
        if self.alphabet_size < 1:
            raise ValueError(f"alphabet_size={self.alphabet_size} is not positive")
        _check_training(self.vocab_size, len(self.special.tokens), self.max_training_bytes)

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "HuggingFaceTokenizer":
        """Trains on the texts."""
        from tokenizers import models, trainers

        sample = _sample(texts, self.max_training_bytes, self.seed, progress)
        library = self._library(models.WordPiece(unk_token=str(self.special.unk)))
        alphabet = self._alphabet(library, sample)
        # The library numbers the characters inside words (##e) in the random order of a hash map, and breaks ties
        # between merges by these numbers. Named in advance, they have an order; the fresh model below forgets that
        # they were passed as special tokens.
        inside = [_CONTINUING + character for character in alphabet]
        reserved = [*self.special.tokens, *inside]
        if self.vocab_size <= len(reserved) + len(alphabet):
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small: special tokens and twice the {len(alphabet)} characters "
                f"of this text take {len(reserved) + len(alphabet)}; use more, or lower alphabet_size="
                f"{self.alphabet_size}"
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=reserved,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        _fit(library, sample, trainer, self.vocab_size, self.min_frequency)
        model = models.WordPiece(
            vocab=library.get_vocab(), unk_token=str(self.special.unk), continuing_subword_prefix=_CONTINUING
        )
        return _finished(self._library(model), self.special)

    def _library(self, model: Any) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, normalizers, pre_tokenizers

        library = Library(model)
        library.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece(prefix=_CONTINUING)
        return library

    def _alphabet(self, library: "tokenizers.Tokenizer", sample: Sample) -> list[str]:
        """The most frequent characters, in an order that the corpus alone determines."""
        counts: Counter[str] = Counter()
        for block in sample.blocks:
            counts.update(library.normalizer.normalize_str(block))
        ranked = sorted((-count, character) for character, count in counts.items() if not character.isspace())
        return sorted(character for _, character in ranked[: self.alphabet_size])


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; `library` is the library's own object, without padding and truncation."""

    kind: ClassVar[str] = "huggingface"
    model_file: ClassVar[str] = "tokenizer.json"

    def __init__(
        self, model: bytes, special: SpecialTokens | None = None, companions: Mapping[str, bytes] | None = None
    ) -> None:
        """`companions` are the directory's other files, by name. `special` defaults to what they say, or to the
        conventional names among the model's own special tokens. Raises ValueError for a damaged model."""
        self._model = model
        self._companions = dict(companions or {})
        self.library = _open_library(model)
        own = {token.content for token in self.library.get_added_tokens_decoder().values() if token.special}
        if special is None:
            special = _read_special(self._companions, own, self.library.get_vocab())
        # What transformers does with tokens that only its own files name: they are appended to the vocabulary.
        self._missing = [token for token in special.tokens if token not in own]
        self.library.add_special_tokens(self._missing)
        tokens: list[str | None] = [None] * (1 + max(self.library.get_vocab().values(), default=-1))
        for token, index in self.library.get_vocab().items():
            tokens[index] = token
        super().__init__(tokens, special)

    @classmethod
    def open(cls, path: Path, special: SpecialTokens | None = None) -> "HuggingFaceTokenizer":
        """Opens a tokenizer.json and what lies beside it. Raises ValueError, naming it, where it is damaged."""
        beside = {name: path.parent / name for name in _COMPANIONS}
        companions = {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
        try:
            return cls(read_model(path), special, companions)
        except ValueError as error:
            raise ValueError(f"{path} cannot be opened: {error}") from None

    def model_bytes(self) -> bytes:
        """The tokenizer.json."""
        return self._model

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, and what lets `transformers.AutoTokenizer` open the directory."""
        roles = {f"{role}_token": token for role, token in self.special.roles.items()}
        written: dict[str, str | list[str]] = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        if self.special.extra:
            written["additional_special_tokens"] = list(self.special.extra)
        return {
            _CONFIG: (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode(),
            **self._companions,
            self.model_file: self._model,
        }

    def _frame(self) -> Frame:
        for probe in ("a", "0", *(token for token in self._ids if token not in self.special.tokens)):
            encoding = self.library.encode(probe, add_special_tokens=True)
            inside = [number for number, added in enumerate(encoding.special_tokens_mask) if not added]
            if inside:
                return tuple(encoding.ids[: inside[0]]), tuple(encoding.ids[inside[-1] + 1 :])
        return (), ()

    @functools.cached_property
    def _plain_library(self) -> "tokenizers.Tokenizer":
        """A second object that reads the names of special tokens as text; switching one back and forth would race."""
        library = _open_library(self._model)
        library.add_special_tokens(self._missing)
        library.encode_special_tokens = True
        return library

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        library = self.library if parse_special_tokens else self._plain_library
        try:
            return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exceptions
            require_unicode(texts)
            raise ValueError(f"this tokenizer cannot encode the text: {error}") from error

    def _decode(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return self.library.decode_batch(batch, skip_special_tokens=skip_special_tokens)


def _open_library(model: bytes) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(model.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"not a tokenizer.json: {error}") from None
    library.no_padding()
    library.no_truncation()
    return library


def _read_special(companions: Mapping[str, bytes], own: set[str], vocabulary: Mapping[str, int]) -> SpecialTokens:
    """The roles from special_tokens_map.json, then tokenizer_config.json, else by conventional name."""
    roles: dict[str, str] = {}
    extra: list[str] = []
    for name in (_CONFIG, _MAP):
        try:
            data = json.loads(companions.get(name, b"{}"))
        except ValueError as error:
            raise ValueError(f"{name} beside it is damaged: {error}") from None
        roles |= {role: token for role in ROLES if (token := _content(data.get(f"{role}_token"))) is not None}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = data.get(key) or []
            extra += filter(None, map(_content, listed.values() if isinstance(listed, dict) else listed))
    if not roles:
        present = own | {name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary}
        roles = SpecialTokens.guess(present).roles
    others = list(dict.fromkeys([*extra, *sorted(own, key=vocabulary.__getitem__)]))
    return SpecialTokens.from_json({**roles, "extra": [token for token in others if token not in roles.values()]})


def _content(token: object) -> str | None:
    """The string of a token that Hugging Face writes as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _check_training(vocab_size: int, reserved: int, max_training_bytes: int | None) -> None:
    if vocab_size <= reserved:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for tokens: {reserved} are reserved; use more")
    if max_training_bytes is not None and max_training_bytes < SMALLEST_SAMPLE:
        raise ValueError(f"max_training_bytes={max_training_bytes} is less than {SMALLEST_SAMPLE}")


def _sample(texts: Texts | None, max_bytes: int | None, seed: int, progress: Progress | None) -> Sample:
    if texts is None:
        raise ValueError("training a tokenizer needs texts; to open one, use HuggingFace(path=...)")
    return sample_text(texts(), max_bytes, seed=seed, progress=progress)


def _fit(library: "tokenizers.Tokenizer", sample: Sample, trainer: Any, vocab_size: int, min_frequency: int) -> None:
    """Trains, and raises ValueError where the corpus has fewer tokens than asked for."""
    library.train_from_iterator(sample.blocks, trainer=trainer, length=len(sample.blocks))
    found = library.get_vocab_size()
    if found < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is more than this corpus supports: {sample} gives at most {found} with "
            f"min_frequency={min_frequency}; use vocab_size={found}, or more text"
        )


def _finished(library: "tokenizers.Tokenizer", special: SpecialTokens) -> HuggingFaceTokenizer:
    """The trained model with its frame written into its own post-processor, so that others apply it too."""
    from tokenizers import processors

    library.add_special_tokens(list(special.tokens))
    ids = library.get_vocab()
    names = {index: token for token, index in ids.items()}
    before, after = ([names[index] for index in part] for part in conventional_frame(special, ids))
    if before or after:
        pair = [*before, "$A", *after, *(["$B:1", *(f"{name}:1" for name in after)] if after else ["$B:1"])]
        library.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=pair,
            special_tokens=[(name, ids[name]) for name in dict.fromkeys([*before, *after])],
        )
    return HuggingFaceTokenizer(library.to_str().encode(), special)
