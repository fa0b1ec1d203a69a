"""Tokenizers on disk: a model file that other tools read as well, and a small manifest that says what it is."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab import buckets
from llmlab.tokenizers.special import SpecialTokens

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer

MANIFEST = "llmlab_tokenizer.json"
_FORMAT = 1
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")


def write_manifest(directory: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Writes the files and then the manifest, each at once: a crash leaves no half-written tokenizer that opens."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, **manifest}, indent=2) + "\n"
    for name, content in [*files.items(), (MANIFEST, text.encode())]:
        temporary = directory / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, directory / name)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Opens a tokenizer.

    `path` is a directory that `Tokenizer.save` wrote, a run directory (which holds one in `tokenizer/`) or one of its
    checkpoints, a Hugging Face directory with a tokenizer.json, a directory with a SentencePiece tokenizer.model, or
    one of these files. The address of such a directory in a bucket (gs://...) will do too.

    Raises:
        FileNotFoundError: there is no tokenizer at the path.
        ValueError: what is there is damaged.
    """
    path = buckets.local(path, weights=False)
    if path.name == MANIFEST and path.is_file():
        path = path.parent
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no tokenizer at {path}: no such file or directory")
    run = path.absolute().parent.parent if path.absolute().parent.name == "checkpoints" else path
    for directory in (path, path / "tokenizer", run / "tokenizer"):
        if (directory / MANIFEST).is_file():
            return _open_saved(directory)
    for name in ("tokenizer.json", *_SENTENCEPIECE_FILES):
        if (path / name).is_file():
            return _open_file(path / name)
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise FileNotFoundError(
        f"{path} holds no tokenizer: none of {MANIFEST}, tokenizer/, tokenizer.json, {', '.join(_SENTENCEPIECE_FILES)} "
        f"(it holds {shown})"
    )


def read_model(path: Path) -> bytes:
    """A model file's content. Raises FileNotFoundError or, where it is empty, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer model at {path}")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; restore the file, or train the tokenizer again")
    return content


def _open_file(path: Path) -> "Tokenizer":
    if path.suffix == ".json":
        from llmlab.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer.open(path)
    if path.suffix == ".model":
        from llmlab.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.open(path)
    raise ValueError(f"{path} is no tokenizer file; expected tokenizer.json or a SentencePiece *.model")


def _open_saved(directory: Path) -> "Tokenizer":
    """The tokenizer of a directory with a manifest, checked against its fingerprint."""
    kind, model_file, special, fingerprint = _read_manifest(directory / MANIFEST)
    model = directory / model_file
    read_model(model)
    if kind == "bytes":
        from llmlab.tokenizers.byte_level import BytesTokenizer

        tokenizer = BytesTokenizer.open(model, special)
    elif kind == "sentencepiece":
        from llmlab.tokenizers.sentencepiece import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer.open(model, special)
    elif kind == "huggingface":
        from llmlab.tokenizers.huggingface import HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer.open(model, special)
    else:
        raise ValueError(f"{directory / MANIFEST} names an unknown kind {kind!r}; was it written by a later version?")
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{model} is not the file that was saved: its fingerprint is {tokenizer.fingerprint[:12]}, that in "
            f"{MANIFEST} is {fingerprint[:12]}; restore it, or train the tokenizer again"
        )
    return tokenizer


def _read_manifest(path: Path) -> tuple[str, str, SpecialTokens, str]:
    """kind, model file, special tokens, fingerprint."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r} instead of {_FORMAT}")
        kind, model_file, fingerprint = (str(data[key]) for key in ("kind", "model_file", "fingerprint"))
        if Path(model_file).name != model_file:
            raise ValueError(f"model_file {model_file!r} is no plain file name")
        return kind, model_file, SpecialTokens.from_json(data["special"]), fingerprint
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
