"""Special tokens: the ones that stand for structure (start, end, padding, a hidden word), not for text."""

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass

# What the well-known families call each role, for tokenizer files that do not say. The first name present wins.
_CONVENTIONAL: dict[str, tuple[str, ...]] = {
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]", "<|endoftext|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
ROLES = tuple(_CONVENTIONAL)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The strings of the special tokens; a role that is None does not exist. One string may have two roles."""

    bos: str | None = "<s>"
    """Begins a sequence."""
    eos: str | None = "</s>"
    """Ends a sequence, or separates packed documents."""
    pad: str | None = "<pad>"
    """Fills rows of a batch up to a common length."""
    unk: str | None = None
    """Stands for text that the vocabulary cannot express."""
    cls: str | None = None
    """Begins an encoder's input; its output stands for the whole sequence."""
    sep: str | None = None
    """Ends each part of an encoder's input."""
    mask: str | None = None
    """Stands for a word that the model shall guess."""
    extra: tuple[str, ...] = ()
    """User-defined tokens, for instance the turn markers of a chat."""

    def __post_init__(self) -> None:
        if "" in self.tokens:
            raise ValueError("a special token cannot be the empty string; use None for a role that does not exist")
        if len(set(self.extra)) != len(self.extra) or set(self.extra) & set(self.roles.values()):
            raise ValueError(f"extra={self.extra} repeats a special token; name each one once")

    @property
    def roles(self) -> dict[str, str]:
        """Role -> token, for the roles that exist."""
        return {role: token for role in ROLES if (token := getattr(self, role)) is not None}

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every special token once: the roles in the order of the fields, then the extra ones."""
        return tuple(dict.fromkeys((*self.roles.values(), *self.extra)))

    def to_json(self) -> dict[str, str | list[str] | None]:
        """The fields as JSON values."""
        return {**{role: getattr(self, role) for role in ROLES}, "extra": list(self.extra)}

    @staticmethod
    def from_json(data: Mapping[str, object]) -> "SpecialTokens":
        """Inverse of `to_json`. Raises ValueError for anything else."""
        unknown = set(data) - {field.name for field in dataclasses.fields(SpecialTokens)}
        if unknown:
            raise ValueError(f"unknown special token roles {sorted(unknown)}; there are {', '.join(ROLES)} and extra")
        roles: dict[str, str | None] = dict.fromkeys(ROLES)
        for role in ROLES:
            token = data.get(role)
            if token is not None and not isinstance(token, str):
                raise ValueError(f"special token {role}={token!r} is no string")
            roles[role] = token
        extra = data.get("extra", [])
        if not isinstance(extra, (list, tuple)) or not all(isinstance(token, str) for token in extra):
            raise ValueError(f"extra special tokens {extra!r} are no list of strings")
        return SpecialTokens(**roles, extra=tuple(extra))

    @staticmethod
    def guess(present: Container[str], others: tuple[str, ...] = ()) -> "SpecialTokens":
        """The roles by the names that they conventionally have, for a model file that holds only a vocabulary.

        `present` are the tokens that may have a role; `others` are special tokens of the file, which become `extra`
        where no role claims them.
        """
        found = {role: next((name for name in names if name in present), None) for role, names in _CONVENTIONAL.items()}
        return SpecialTokens(**found, extra=tuple(token for token in others if token not in found.values()))
