"""`llmlab tokenizer`: train a tokenizer, encode and decode with it, look inside it."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.data import Source
    from llmlab.tokenizers import Tokenizer, TokenizerConfig

DESCRIPTION = """\
Train a tokenizer on files, and use one (a directory that train wrote, a run, a Hugging Face directory, a tokenizer.json
or a SentencePiece *.model):
    llmlab tokenizer train 'books/**/*.txt' --kind bpe --vocab-size 8192 --out tokenizers/books
    llmlab tokenizer encode tokenizers/books "some text" --tokens
    llmlab tokenizer decode tokenizers/books 17 4 22
    llmlab tokenizer info tokenizers/books --text book.txt
"""

# --kind -> what it is.
KINDS = {
    "unigram": "SentencePiece unigram: shortest sequences, slowest to train",
    "bpe": "SentencePiece byte-pair encoding: nearly as short, trains in a fraction of the time",
    "char": "SentencePiece characters",
    "word": "SentencePiece words",
    "byte-bpe": "byte-level byte-pair encoding, as GPT-2 has it",
    "wordpiece": "WordPiece, as BERT has it (loses case and white space)",
    "bytes": "bytes of UTF-8; nothing to train",
}


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab tokenizer`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.action is None:
        parser.print_help()
        return 2
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train,
        "encode": _encode,
        "decode": _decode,
        "info": _info,
    }
    return actions[arguments.action](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab tokenizer",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="{train,encode,decode,info}")
    _add_train(actions)

    encode = actions.add_parser("encode", help="print the ids of a text", allow_abbrev=False)
    encode.add_argument("tokenizer", type=Path, help="directory or file of the tokenizer")
    encode.add_argument("text", nargs="?", help="the text; standard input where it is left out")
    encode.add_argument("--tokens", action="store_true", help="print the tokens beside the ids, one a line")
    encode.add_argument("--add-special-tokens", action="store_true", help="with the model's own frame around the text")
    encode.add_argument(
        "--parse-special-tokens", action="store_true", help="read the names of special tokens in the text as tokens"
    )
    encode.add_argument("--json", action="store_true", help="print a JSON object instead")

    decode = actions.add_parser("decode", help="print the text of ids", allow_abbrev=False)
    decode.add_argument("tokenizer", type=Path, help="directory or file of the tokenizer")
    decode.add_argument("ids", nargs="*", help="the ids; standard input where they are left out")
    decode.add_argument("--skip-special-tokens", action="store_true", help="leave special tokens out")
    decode.add_argument("--json", action="store_true", help="print a JSON object instead")

    info = actions.add_parser("info", help="say what a tokenizer is, and how well it fits a text", allow_abbrev=False)
    info.add_argument("tokenizer", type=Path, help="directory or file of the tokenizer")
    info.add_argument("--text", type=Path, help="a text file to measure it on")
    info.add_argument("--vocabulary", action="store_true", help="print the whole vocabulary, one 'id token' a line")
    info.add_argument("--json", action="store_true", help="print a JSON object instead")
    return parser


def _add_train(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = actions.add_parser(
        "train",
        help="train a tokenizer on files",
        description="kinds:\n" + "\n".join(f"  {kind.ljust(10)}{text}" for kind, text in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("files", nargs="*", help="text files or patterns; *.jsonl (also .gz, .zst) for JSON Lines")
    train.add_argument("--standard-library", action="store_true", help="train on this Python's own source code")
    train.add_argument("--field", default="text", help="field of JSON Lines that holds the text (default: text)")
    train.add_argument("--out", type=Path, required=True, help="directory to write")
    train.add_argument("--kind", choices=list(KINDS), default="unigram", help="the model (default: unigram)")
    train.add_argument("--vocab-size", type=int, default=1024, help="number of tokens (default: 1024)")
    train.add_argument(
        "--symbol",
        action="append",
        default=[],
        help="SentencePiece: a string that is always one token, beside newline; may be repeated; \\n and \\t are read",
    )
    train.add_argument(
        "--split-by-whitespace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="SentencePiece: keep pieces within words (default: yes)",
    )
    train.add_argument("--split-digits", action="store_true", help="SentencePiece: make every digit a token of its own")
    train.add_argument(
        "--max-training-bytes", type=int, default=10_000_000, help="sample this much text (default: 10000000)"
    )
    train.add_argument("--seed", type=int, default=0, help="which sample (default: 0)")
    train.add_argument("--json", action="store_true", help="print a JSON object about the result")


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    sources = _sources(arguments)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise FileExistsError(f"{arguments.out} exists; choose another --out, or remove it")
    start = time.perf_counter()
    tokenizer = config.build(lambda: _texts(sources), progress=_show_progress if sys.stderr.isatty() else None)
    tokenizer.save(arguments.out)
    record = {"directory": str(arguments.out), **_facts(tokenizer), "seconds": time.perf_counter() - start}
    if arguments.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(f"{arguments.out}: {tokenizer.vocab_size:,} tokens, in {record['seconds']:.1f} s")
        print(f"look inside: llmlab tokenizer info {arguments.out}")
    return 0


def _show_progress(done: int, total: int | None, what: str) -> None:
    sys.stderr.write(f"\r{done:,} {what} read" + ("; training\n" if done == total else ""))
    sys.stderr.flush()


def _config(arguments: argparse.Namespace) -> "TokenizerConfig":
    from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, WordPiece

    kind, vocab_size = arguments.kind, arguments.vocab_size
    sample, seed = arguments.max_training_bytes, arguments.seed
    if kind == "bytes":
        return Bytes()
    if kind == "byte-bpe":
        return ByteLevelBPE(vocab_size=vocab_size, max_training_bytes=sample, seed=seed)
    if kind == "wordpiece":
        return WordPiece(vocab_size=vocab_size, max_training_bytes=sample, seed=seed)
    symbols = (symbol.replace("\\n", "\n").replace("\\t", "\t") for symbol in arguments.symbol)
    return SentencePiece(
        vocab_size=vocab_size,
        kind=kind,
        symbols=tuple(dict.fromkeys(("\n", *symbols))),
        split_by_whitespace=arguments.split_by_whitespace,
        split_digits=arguments.split_digits,
        max_training_bytes=sample,
        seed=seed,
    )


def _sources(arguments: argparse.Namespace) -> list["Source"]:
    """The corpus. Raises FileNotFoundError for patterns without a file, before any work."""
    from llmlab.data import JSONLines, StandardLibrary, TextFiles
    from llmlab.data.sources import find_files

    if arguments.kind == "bytes":
        return []
    if not arguments.files and not arguments.standard_library:
        raise ValueError("nothing to train on: name text files, or pass --standard-library")
    find_files(arguments.files)
    sources: list[Source] = [StandardLibrary()] if arguments.standard_library else []
    for name in arguments.files:
        lines = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix == ".jsonl"
        sources.append(JSONLines(name, field=arguments.field) if lines else TextFiles(name))
    return sources


def _texts(sources: Sequence["Source"]) -> Iterator[str]:
    for source in sources:
        for document in source.documents():
            yield document.text


def _encode(arguments: argparse.Namespace) -> int:
    tokenizer = _open(arguments.tokenizer)
    text = sys.stdin.read() if arguments.text is None else arguments.text
    ids = tokenizer.encode(
        text,
        add_special_tokens=arguments.add_special_tokens,
        parse_special_tokens=arguments.parse_special_tokens,
    )
    tokens = [tokenizer.id_to_token(index) for index in ids]
    if arguments.json:
        print(json.dumps({"ids": ids, "tokens": tokens}, ensure_ascii=False))
    elif arguments.tokens:
        for index, token in zip(ids, tokens, strict=True):
            print(f"{index:>7}  {json.dumps(token, ensure_ascii=False)}")
    else:
        print(*ids)
    return 0


def _decode(arguments: argparse.Namespace) -> int:
    tokenizer = _open(arguments.tokenizer)
    words = arguments.ids or sys.stdin.read().split()
    wrong = [word for word in words if not word.lstrip("-").isdecimal()]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no token id; ids are whole numbers from 0 to {tokenizer.vocab_size - 1}")
    text = tokenizer.decode([int(word) for word in words], skip_special_tokens=arguments.skip_special_tokens)
    print(json.dumps({"text": text}, ensure_ascii=False) if arguments.json else text)
    return 0


def _info(arguments: argparse.Namespace) -> int:
    tokenizer = _open(arguments.tokenizer)
    record = _facts(tokenizer)
    if arguments.text is not None:
        record["text"] = _measure(tokenizer, arguments.text)
    rows = sorted((index, token) for token, index in tokenizer.vocabulary.items())
    if arguments.json:
        if arguments.vocabulary:
            record["vocabulary"] = {token: index for index, token in rows}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    _print_facts(record)
    if arguments.vocabulary:
        for index, token in rows:
            print(f"{index:>7}  {json.dumps(token, ensure_ascii=False)}")
    return 0


def _facts(tokenizer: "Tokenizer") -> dict[str, Any]:
    special = tokenizer.special
    hidden = tokenizer.special_ids
    learnt = [token for token, index in tokenizer.vocabulary.items() if index not in hidden]
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special": {role: {"token": token, "id": tokenizer.vocabulary[token]} for role, token in special.roles.items()},
        "extra": {token: tokenizer.vocabulary[token] for token in special.extra},
        "longest": sorted(learnt, key=lambda token: (-len(token), token))[:8],
        "fingerprint": tokenizer.fingerprint,
    }


def _measure(tokenizer: "Tokenizer", path: Path) -> dict[str, Any]:
    from llmlab.data.sources import decode

    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}")
    data = path.read_bytes()
    text, problem = decode(data)
    if problem:
        raise ValueError(f"{path}: {problem}")
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{path} has no text to measure on")
    return {
        "path": str(path),
        "bytes": len(text.encode()),
        "tokens": len(ids),
        "bytes_per_token": len(text.encode()) / len(ids),
        "unknown": ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0,
        "lossless": tokenizer.decode(ids) == text,
    }


def _print_facts(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [("kind", record["kind"]), ("vocabulary", f"{record['vocab_size']:,} tokens")]
    rows += [(role, f"{entry['token']}  ({entry['id']})") for role, entry in record["special"].items()]
    if record["extra"]:
        rows.append(("extra", "  ".join(f"{token} ({index})" for token, index in record["extra"].items())))
    rows += [("longest", "  ".join(json.dumps(token, ensure_ascii=False) for token in record["longest"]))]
    rows += [("fingerprint", record["fingerprint"])]
    if measured := record.get("text"):
        kept = "nothing lost" if measured["lossless"] else "not lossless"
        rows.append(
            (
                measured["path"],
                f"{measured['bytes']:,} bytes, {measured['tokens']:,} tokens: {measured['bytes_per_token']:.2f} bytes "
                f"a token, {measured['unknown']:,} unknown, {kept}",
            )
        )
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(highlight=False).print(table)


def _open(path: Path) -> "Tokenizer":
    from llmlab.tokenizers import load_tokenizer

    return load_tokenizer(path)
