"""BLEU of a translation run: every source is translated, greedily or by beam search, and compared with its reference.

    python experiments/finetune/bleu.py RUN SOURCE TARGET [--beams N] [--length-penalty A] [--limit N]

RUN is the directory of a run trained on `Pairs`, or of its checkpoint; SOURCE and TARGET are text files (plain, .gz or
.zst) whose lines belong together. BLEU is sacrebleu's, on its own tokenization (Papineni et al. 2002; Post 2018,
1804.08771), and its signature is printed: it is what makes two numbers comparable. Needs sacrebleu, which is in the
`evals` extra.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run trained on Pairs")
    parser.add_argument("source", help="file of sources, one a line")
    parser.add_argument("target", help="file of their references")
    parser.add_argument("--beams", type=int, default=1, help="beams of the search; 1 decodes greedily (1)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="power of the length in beam search (1.0)")
    parser.add_argument("--limit", type=int, help="only so many of the first lines")
    parser.add_argument("--show", type=int, default=3, help="print so many translations (3)")
    parser.add_argument("--json", action="store_true", help="print a JSON line")
    return parser.parse_args()


def main() -> None:
    """Translates and prints the score."""
    args = parse()
    try:
        import sacrebleu
    except ImportError:
        sys.exit("BLEU needs sacrebleu: pip install 'llmlab[evals]'")
    import llmlab
    from llmlab.config import load
    from llmlab.data.pairs import Pairs, aligned
    from llmlab.experiment import Experiment

    experiment = load(args.run, Experiment)
    data, length = experiment.data, experiment.train.sequence_length
    if not isinstance(data, Pairs) or length is None:
        sys.exit(f"{args.run} was trained on {type(data).__name__}; what translates was trained on Pairs")
    model: Any = llmlab.load(args.run)
    tokenizer = llmlab.load_tokenizer(args.run)
    pairs = aligned((args.source,), (args.target,))[: args.limit]
    started = time.perf_counter()
    sources = [data.framed(tokenizer, tokenizer.encode(data.texts(pair)[0]), length) for pair in pairs]
    targets = translated(model, sources, tokenizer, args, data.target_length or length)
    translations = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in targets]
    seconds = time.perf_counter() - started
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(translations, [[reference for _, reference in pairs]])
    if args.json:
        signature = str(metric.get_signature())
        print(json.dumps({"bleu": score.score, "sentences": len(pairs), "seconds": seconds, "signature": signature}))
        return
    for (source, reference), translation in zip(pairs[: args.show], translations, strict=False):
        print(f"source       {source}\ntranslation  {translation}\nreference    {reference}\n")
    print(f"{score}\n{metric.get_signature()}\n{len(pairs)} sentences in {seconds:.1f} s")


def translated(model: Any, sources: list[list[int]], tokenizer: Any, args: argparse.Namespace, longest: int) -> Any:
    """Tokens of every translation."""
    from llmlab.infer.beam import beam_search
    from llmlab.infer.greedy import greedy

    shared = {"max_new_tokens": longest, "eos_id": tokenizer.eos_id, "num_tokens": tokenizer.vocab_size}
    if args.beams == 1:
        return greedy(model, sources, **shared)
    found = beam_search(
        model, sources, num_beams=args.beams, length_penalty=args.length_penalty, batch_size=32, **shared
    )
    return [list(hypotheses[0].token_ids) for hypotheses in found]


if __name__ == "__main__":
    main()
