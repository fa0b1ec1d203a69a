"""`llmlab generate`: let a trained model continue a prompt, shown as it is written."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmlab.infer.generate import Completion

DESCRIPTION = """\
Continue a prompt with the model of a run, a checkpoint or a Hugging Face directory. The text appears as it is written;
speed goes to the error stream, so that the output is the text alone:
    llmlab generate runs/quickstart-1a2b3c4d --prompt "def main(" --temperature 0.8 --top-p 0.95
The same seed gives the same text.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab generate`."""
    arguments = _parser().parse_args(argv)
    prompt = _prompt(arguments)

    import llmlab
    from llmlab.infer.sampling import Sampling

    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    model, tokenizer = llmlab.load(arguments.model), llmlab.load_tokenizer(arguments.model)
    # Several samples cannot be streamed into one terminal side by side: they are shown when they are done.
    alone = arguments.num_samples == 1 and not arguments.json

    def show(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if alone:
        show(0, prompt)
    start = time.perf_counter()
    completions = llmlab.generate(
        model,
        tokenizer,
        [prompt] * arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stream=show if alone else None,
    )
    seconds = time.perf_counter() - start
    if arguments.json:
        print(json.dumps([_record(prompt, completion) for completion in completions], indent=2))
        return 0
    if alone:
        print()
    else:
        for number, completion in enumerate(completions, start=1):
            print(f"--- sample {number} of {len(completions)}\n{prompt}{completion.text}")
    _explain(completions, seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab generate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="a run, a checkpoint or a Hugging Face directory")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", metavar="TEXT", help="what the model continues; nothing by default")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file; - for the input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (128)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 is greedy, below 1 sharper, above flatter (1)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the most probable tokens of mass P only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (0)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations of the prompt (1)")
    parser.add_argument("--json", action="store_true", help="print prompt, text, tokens and finish reason as JSON")
    return parser


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.num_samples < 1:
        raise ValueError(f"--num-samples {arguments.num_samples} is not positive")
    if arguments.prompt_file is None:
        return arguments.prompt
    if str(arguments.prompt_file) == "-":
        return sys.stdin.read()
    try:
        return arguments.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.prompt_file} is not UTF-8 text: {error}") from None


def _record(prompt: str, completion: "Completion") -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _explain(completions: "list[Completion]", seconds: float) -> None:
    tokens = sum(len(completion.token_ids) for completion in completions)
    reasons = {
        "stop": "the model ended the text",
        "length": "--max-new-tokens reached",
        "position": "the model has no more positions",
    }
    ended = " / ".join(dict.fromkeys(reasons[completion.finish_reason] for completion in completions))
    print(f"{tokens} tokens in {seconds:.1f} s, compilation included ({ended})", file=sys.stderr)
