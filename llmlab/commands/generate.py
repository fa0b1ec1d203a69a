"""`llmlab generate`: let a trained model continue a prompt, shown as it is written."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.offloading import add_offload_layers, check_offload_layers, offloaded

if TYPE_CHECKING:
    from llmlab.infer.completion import Completion, TokenLogprob
    from llmlab.infer.constraints import Constraint
    from llmlab.infer.sampling import Sampling
    from llmlab.infer.strategies import Strategy
    from llmlab.tokenizers import Tokenizer

DESCRIPTION = """\
Continue a prompt with the model of a run, a checkpoint or a Hugging Face directory. The text appears as it is written;
speed goes to the error stream, so that the output is the text alone:
    llmlab generate runs/quickstart-1a2b3c4d --prompt "def main(" --temperature 0.8 --top-p 0.95
    llmlab generate RUN --prompt "Answer:" --regex "(yes|no)"          # the text has this form, whatever the model
    llmlab generate RUN --prompt "def f(" --stop $'\\n\\n' --num-samples 4 --json --logprobs 5
    llmlab generate RUN --prompt "import " --beams 4                   # the most probable text; or --draft SMALLER_RUN
The same seed gives the same text. An encoder-decoder reads the prompt and writes its target.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab generate`."""
    arguments = _parser().parse_args(argv)
    prompt, sampling, constraint = _prompt(arguments), _sampling(arguments), _constraint(arguments)

    import jax.numpy as jnp

    import llmlab
    from llmlab.models.encoder_decoder import EncoderDecoder
    from llmlab.sharding.xla_flags import leave_out_absent_tpu

    leave_out_absent_tpu()
    strategy = _strategy(arguments, sampling)
    check_offload_layers(arguments.model, arguments.offload_layers)
    model: Any = offloaded(llmlab.load(arguments.model, host=arguments.offload_layers > 0), arguments.offload_layers)
    tokenizer = llmlab.load_tokenizer(arguments.model)
    # Several samples cannot be streamed into one terminal side by side: they are shown when they are done.
    alone = arguments.num_samples == 1 and not arguments.json
    before = "" if isinstance(model.config, EncoderDecoder) else prompt

    def show(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if alone:
        show(0, before)
    start = time.perf_counter()
    try:
        completions = llmlab.generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling if strategy is None or _speculates(arguments) else None,
            strategy=strategy,
            n=arguments.num_samples,
            stop=arguments.stop,
            constraint=constraint,
            prompt_logprobs=arguments.prompt_logprobs,
            inputs=_images(arguments, model.config) if arguments.image else None,
            cache_dtype=None if arguments.cache_dtype is None else jnp.dtype(arguments.cache_dtype),
            deterministic=arguments.deterministic,
            stream=show if alone else None,
        )
    except ImportError as error:  # says what to install
        raise ValueError(str(error)) from error
    seconds = time.perf_counter() - start
    if arguments.json:
        print(json.dumps([_record(prompt, completion, tokenizer) for completion in completions], indent=2))
        return 0
    if alone:
        print()
    else:
        for number, completion in enumerate(completions, start=1):
            print(f"--- sample {number} of {len(completions)}\n{before}{completion.text}")
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
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations of the prompt (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text (0)")
    parser.add_argument("--json", action="store_true", help="print prompt, text, tokens and finish reason as JSON")
    _add_sampling(parser.add_argument_group("which tokens are drawn"))
    _add_forms(parser.add_argument_group("the form of the text (one of them; pip install 'llmlab[serve]')"))
    _add_strategies(parser.add_argument_group("other ways to write than token by token (one of them)"))
    more = parser.add_argument_group("log-probabilities, images, numbers, memory")
    more.add_argument("--logprobs", type=int, metavar="N", help="with --json: of every token and of the N best; 0: its")
    more.add_argument("--prompt-logprobs", action="store_true", help="with --json: of the prompt's tokens")
    more.add_argument("--image", type=Path, action="append", metavar="FILE", help="what the model looks at; repeatable")
    more.add_argument(
        "--image-mean", type=float, default=0.5, metavar="X", help="subtracted from pixels in 0 to 1 (.5)"
    )
    more.add_argument("--image-std", type=float, default=0.5, metavar="X", help="and what they are divided by (.5)")
    more.add_argument(
        "--cache-dtype", choices=("float32", "bfloat16", "int8"), help="storage of keys and values (the parameters')"
    )
    more.add_argument(
        "--deterministic", action="store_true", help="the last bits do not depend on the number of samples either"
    )
    add_offload_layers(more)
    return parser


def _add_sampling(group: Any) -> None:
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 is greedy, below 1 sharper, above flatter (1)"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable tokens only")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the most probable tokens of mass P only")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens at least P times as probable as the best")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: against tokens of prompt and text"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="A", help="above 0: against tokens that the text has (0)"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="F", help="above 0: for each time that it has them (0)"
    )
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=X", help="add X to a token's score; -inf bans it"
    )


def _add_forms(group: Any) -> None:
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that the schema in this file accepts")
    forms.add_argument("--regex", metavar="PATTERN", help="text that the regular expression matches as a whole")
    forms.add_argument("--regex-file", type=Path, metavar="FILE", help="the same, read from a file")
    forms.add_argument("--grammar", type=Path, metavar="FILE", help="a sentence of the grammar, in Lark's notation")


def _add_strategies(group: Any) -> None:
    ways = group.add_mutually_exclusive_group()
    ways.add_argument("--beams", type=int, metavar="N", help="the most probable text that N prefixes lead to")
    ways.add_argument(
        "--contrastive", type=float, metavar="ALPHA", help="a probable token unlike the text so far; 0.6 is usual"
    )
    ways.add_argument(
        "--draft", type=Path, metavar="RUN", help="a smaller model proposes tokens: the same text, faster"
    )
    ways.add_argument("--prompt-lookup", action="store_true", help="what followed these words before is proposed")
    group.add_argument("--length-penalty", type=float, metavar="X", help="of --beams: 0 prefers short texts (1)")
    group.add_argument("--num-drafted", type=int, metavar="N", help="tokens proposed at a time (4)")


def _speculates(arguments: argparse.Namespace) -> bool:
    """Whether tokens are drawn, but proposed before."""
    return arguments.draft is not None or arguments.prompt_lookup


def _strategy(arguments: argparse.Namespace, sampling: "Sampling") -> "Strategy | None":
    import llmlab
    from llmlab.infer.drafts import PromptLookup
    from llmlab.infer.sampling import Sampling
    from llmlab.infer.strategies import Beams, Contrastive, Speculation

    if arguments.length_penalty is not None and arguments.beams is None:
        raise ValueError("--length-penalty ranks what beams find: give --beams too, or leave it out")
    if arguments.num_drafted is not None and not _speculates(arguments):
        raise ValueError("--num-drafted counts proposals: give --draft or --prompt-lookup too, or leave it out")
    if _speculates(arguments):
        draft: Any = PromptLookup() if arguments.prompt_lookup else llmlab.load(arguments.draft)
        return Speculation(draft=draft, num_drafted=4 if arguments.num_drafted is None else arguments.num_drafted)
    if arguments.beams is None and arguments.contrastive is None:
        return None
    name = "--contrastive" if arguments.beams is None else "--beams"
    others = dataclasses.replace(sampling, seed=0, top_k=sampling.top_k if arguments.beams else None)
    if others != Sampling():
        raise ValueError(f"{name} searches and draws nothing: leave out how tokens are drawn, and --logprobs")
    if arguments.beams is not None:
        penalty = 1.0 if arguments.length_penalty is None else arguments.length_penalty
        return Beams(num_beams=arguments.beams, length_penalty=penalty)
    return Contrastive(top_k=arguments.top_k or 4, alpha=arguments.contrastive)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.num_samples < 1:
        raise ValueError(f"--num-samples {arguments.num_samples} is not positive")
    if (arguments.logprobs is not None or arguments.prompt_logprobs) and not arguments.json:
        raise ValueError("log-probabilities are printed as JSON; add --json")
    if arguments.image_std <= 0:
        raise ValueError(f"--image-std {arguments.image_std} is not positive; pixels are divided by it")
    if arguments.prompt_file is None:
        return arguments.prompt
    if str(arguments.prompt_file) == "-":
        return sys.stdin.read()
    return _read(arguments.prompt_file)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _sampling(arguments: argparse.Namespace) -> "Sampling":
    from llmlab.infer.sampling import Sampling

    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        logit_bias=tuple(_bias(given) for given in arguments.logit_bias),
        seed=arguments.seed,
        logprobs=arguments.logprobs,
    )


def _bias(given: str) -> tuple[int, float]:
    index, _, value = given.partition("=")
    try:
        return int(index), float(value)
    except ValueError:
        raise ValueError(f"--logit-bias {given} is no token and number; write 42=1.5, or 42=-inf") from None


def _constraint(arguments: argparse.Namespace) -> "Constraint | None":
    from llmlab.infer.constraints import Grammar, JsonSchema, Regex

    if arguments.json_schema is not None:
        return JsonSchema(_read(arguments.json_schema))
    if arguments.grammar is not None:
        return Grammar(_read(arguments.grammar))
    if arguments.regex_file is not None:
        return Regex(_read(arguments.regex_file).removesuffix("\n"))
    return None if arguments.regex is None else Regex(arguments.regex)


def _images(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The images as the model's tower sees them: (1, images, height, width, channels)."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from llmlab.data.images import normalised
    from llmlab.models.paligemma import PaliGemma
    from llmlab.models.visual_decoder import VisualDecoder

    if not isinstance(config, (PaliGemma, VisualDecoder)):
        raise ValueError(f"--image: a model of a {type(config).__name__} sees no images; leave it out")
    size, mode = config.vision.image_size, {1: "L", 3: "RGB"}[config.vision.channels]
    arrays = []
    for path in arguments.image:
        try:
            with Image.open(path) as image:
                shown = image.convert(mode).resize((size, size), Image.Resampling.BILINEAR)
        except UnidentifiedImageError:
            raise ValueError(f"--image {path} is no image that can be read; use PNG or JPEG") from None
        pixels = np.asarray(shown, np.float32).reshape(size, size, -1) / 255
        arrays.append(normalised(pixels, (arguments.image_mean,), (arguments.image_std,)))
    return {"pixel_values": np.stack(arrays)[None]}


def _record(prompt: str, completion: "Completion", tokenizer: "Tokenizer") -> dict[str, object]:
    record: dict[str, object] = {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.score is not None:
        record["score"] = completion.score
    if completion.stop is not None:
        record["stop"] = completion.stop
    if completion.logprobs is not None:
        record["logprobs"] = [_logprob(token, tokenizer) for token in completion.logprobs]
    if completion.prompt_logprobs is not None:
        found = completion.prompt_logprobs
        record["prompt_logprobs"] = [None if token is None else _logprob(token, tokenizer) for token in found]
    return record


def _logprob(token: "TokenLogprob", tokenizer: "Tokenizer") -> dict[str, object]:
    top = [{"token": tokenizer.id_to_token(i), "token_id": i, "logprob": logprob} for i, logprob in token.top]
    known = token.token_id < tokenizer.vocab_size  # the places of images may lie beyond
    name = tokenizer.id_to_token(token.token_id) if known else None
    return {"token": name, "token_id": token.token_id, "logprob": token.logprob, "top": top}


def _explain(completions: "list[Completion]", seconds: float) -> None:
    tokens = sum(len(completion.token_ids) for completion in completions)
    ended = " / ".join(dict.fromkeys(map(_reason, completions)))
    print(f"{tokens} tokens in {seconds:.1f} s, compilation included ({ended})", file=sys.stderr)


def _reason(completion: "Completion") -> str:
    if isinstance(completion.stop, str):
        return f"stopped at {completion.stop!r}"
    return {
        "stop": "the model ended the text" if completion.stop is not None else "the form is complete",
        "length": "--max-new-tokens reached",
        "position": "the model has no more positions",
    }[completion.finish_reason]
