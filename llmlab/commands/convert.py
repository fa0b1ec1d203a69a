"""`llmlab convert`: between runs and Hugging Face directories, either way."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Convert a model, in the direction that the source tells:
    llmlab convert runs/quickstart-1a2b3c4d out/quickstart-hf       run or checkpoint -> Hugging Face directory
    llmlab convert models/gpt2 runs/gpt2                            Hugging Face directory -> llmlab model

A Hugging Face directory holds config.json, model.safetensors (float32) and the tokenizer where it is a tokenizer.json
or a SentencePiece model: transformers opens it with from_pretrained. An llmlab model is a directory like a run's, with
the weights as checkpoints/0 and the model alone in its config.json: llmlab generate, llmlab info, llmlab.load and an
experiment's initialize_from take it. Both ways are exact, to the last bit.

Nothing is ever overwritten: the destination must not exist, or be empty. What a family cannot express, and what llmlab
does not implement, is refused with all of it listed, before anything is written.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab convert`."""
    parser = argparse.ArgumentParser(
        prog="llmlab convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a run, a checkpoint or a Hugging Face directory")
    parser.add_argument("destination", type=Path, metavar="DST", help="a directory that does not exist, or is empty")
    parser.add_argument(
        "--model-type",
        metavar="NAME",
        help="Hugging Face family to write, where several have the model (default: the first that does)",
    )
    parser.add_argument("--ema", action="store_true", help="the average of the weights, for a run that kept one")
    arguments = parser.parse_args(argv)

    from llmlab.runs import is_hugging_face, locate

    source, destination = arguments.source, arguments.destination
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and is not an empty directory; it is left as it is: name another")
    to_llmlab = is_hugging_face(locate(source)[0])
    for name, given in (("--model-type", arguments.model_type), ("--ema", arguments.ema)):
        if to_llmlab and given:
            raise ValueError(f"{name} is about runs, and {source} is a Hugging Face directory")
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination first: it gets its name when everything in it is complete.
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.absolute().parent))
    try:
        if to_llmlab:
            notes = _to_llmlab(source, staging)
        else:
            notes = _to_hugging_face(source, staging, arguments.model_type, ema=arguments.ema)
        staging.chmod(0o755)  # mkdtemp's are for their owner only
        if destination.exists():
            destination.rmdir()
        staging.rename(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{destination}: {'an llmlab model' if to_llmlab else 'a Hugging Face directory'}, from {source}")
    return 0


def _to_llmlab(source: Path, directory: Path) -> list[str]:
    """Writes config, weights and tokenizer; returns what the user should know."""
    import llmlab
    from llmlab.config import save
    from llmlab.nn.module import split
    from llmlab.training.checkpoint import save_params
    from llmlab.training.directory import RunDirectory

    model, run = llmlab.load(source), RunDirectory(directory)
    save_params(run.checkpoints, split(model)[1], step=0)
    try:
        llmlab.load_tokenizer(source).save(run.tokenizer)
    except FileNotFoundError as error:
        notes = [f"note: no tokenizer was converted ({error})"]
    else:
        notes = []
    save(model.config, directory)
    return notes


def _to_hugging_face(source: Path, directory: Path, model_type: str | None, *, ema: bool) -> list[str]:
    """Writes config, weights and tokenizer; returns what the user should know."""
    import llmlab
    from llmlab.runs import load, locate

    llmlab.save_hf(load(source, ema=ema), directory, model_type=model_type)
    tokenizer = locate(source)[0] / "tokenizer"
    if not tokenizer.is_dir():
        return [f"note: {source} has no tokenizer, so none was written"]
    for file in tokenizer.iterdir():  # with its manifest: llmlab opens the tokenizer with its special tokens
        shutil.copy2(file, directory / file.name)
    names = {file.name for file in tokenizer.iterdir()}
    if names & {"tokenizer.json", "tokenizer.model", "spiece.model"}:
        return []
    return [f"note: the tokenizer ({', '.join(sorted(names))}) is llmlab's own; transformers has none for this model"]
