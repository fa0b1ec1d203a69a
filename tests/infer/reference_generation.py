"""What transformers writes: shared by the committed fixtures and by the live comparison.

    python -m tests.infer.reference_generation        writes tests/infer/fixtures/generation.json (the parity extra)

The models are those of tests/models/fixtures, so that the fixture holds nothing but tokens and scores. Several tokens
end a sequence: random models seldom write any one of them.
"""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parent / "fixtures" / "generation.json"
MODELS = Path(__file__).parents[1] / "models" / "fixtures"
FAMILIES = ("llama", "gpt2", "t5", "bart")
PROMPTS = ([5, 19, 32, 7], [3, 44], [11, 40, 6, 28, 12, 21, 13])
ENDS = (4, 9, 14, 20, 25, 31, 38, 43, 50)
BANNED = (10, 11, 12)
NEW_TOKENS = 8

Rules = Mapping[str, Any]
SEARCHES: tuple[Rules, ...] = (
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True, "num_return_sequences": 4},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 4},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never", "num_return_sequences": 3},
    {"num_beams": 4, "length_penalty": 0.7, "early_stopping": False, "num_return_sequences": 4, "min_new_tokens": 5},
)


def greedy_tokens(model: Any) -> list[list[int]]:
    """New tokens of every prompt, without their end."""
    sequences = _generated(model, {"num_beams": 1}).sequences
    return [_until_end(row) for row in _new(model, sequences)]


def beams(model: Any, rules: Rules) -> list[list[tuple[list[int], float]]]:
    """New tokens, without their end, and score of every returned sequence of every prompt."""
    found = _generated(model, rules)
    rows = [_until_end(row) for row in _new(model, found.sequences)]
    each = rules["num_return_sequences"]
    pairs = list(zip(rows, found.sequences_scores.tolist(), strict=True))
    return [pairs[first : first + each] for first in range(0, len(pairs), each)]


def _generated(model: Any, rules: Rules) -> Any:
    import torch
    import transformers

    encodes = model.config.is_encoder_decoder
    longest, pad = max(map(len, PROMPTS)), 0
    ids, mask = [], []
    for prompt in PROMPTS:  # sources are padded on the right, prompts on the left
        padding = [0] * (longest - len(prompt))
        ids.append([*prompt, *padding] if encodes else [*padding, *prompt])
        real = [1] * len(prompt)
        mask.append([*real, *padding] if encodes else [*padding, *real])
    # Nothing of the model's own: BART forces an end at the last place.
    start = {"decoder_start_token_id": model.config.decoder_start_token_id} if encodes else {}
    model.generation_config = transformers.GenerationConfig(pad_token_id=pad, **start)
    model.eval()
    with torch.no_grad():
        return model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(ENDS),
            suppress_tokens=list(BANNED),
            output_scores=True,
            return_dict_in_generate=True,
            **rules,
        )


def _new(model: Any, sequences: Any) -> list[list[int]]:
    given = 1 if model.config.is_encoder_decoder else max(map(len, PROMPTS))
    return sequences[:, given:].tolist()


def _until_end(tokens: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in ENDS]
    return list(tokens[: ends[0]] if ends else tokens)


def main() -> None:
    """Writes the fixture."""
    import transformers

    written: dict[str, Any] = {}
    for family in FAMILIES:
        kind = getattr(transformers, json.loads((MODELS / family / "config.json").read_text())["architectures"][0])
        model = kind.from_pretrained(MODELS / family, attn_implementation="eager")
        written[family] = {"greedy": greedy_tokens(model), "beams": [beams(model, rules) for rules in SEARCHES]}
    FIXTURE.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f'"{family}": {json.dumps(values)}' for family, values in written.items())
    FIXTURE.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
