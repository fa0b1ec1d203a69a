"""What a step with a teacher costs: with the teacher beside it, from a cache, and without either.

    python experiments/distill/cost.py TEACHER [--student-layers N] [--steps N] [--entries K] [--json]

TEACHER is a run of a decoder. Four programs take turns, one step each, so that whatever else the machine does meets all
of them alike: a plain step of the student, the teacher's forward pass, a step with the teacher, and a step from a cache
of K entries. Medians are printed, and

    overhead    step with the teacher / (plain step + teacher's forward pass); claim: 1.1 at most
    speed-up    step with the teacher / step from the cache; claim: 2 at least where the teacher is 4 times the student
    state       bytes of parameters and optimizer state, with the teacher and without: the teacher adds none

On 2 CPU cores the overhead is 0.98 to 1.04 and the speed-up 2.1 at width 384, 1.9 at width 192: results/cost_cpu.md.

The optimizer is AdamW, whatever the teacher was trained by: Muon's orthogonalisation costs as much at every batch size,
on 1,024 tokens about as much as the student itself, and would be measured in place of what is asked.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a run of a decoder")
    parser.add_argument("--student-layers", type=int, default=1, help="depth of the student (1)")
    parser.add_argument("--student-width", type=int, help="width of the student (the teacher's)")
    parser.add_argument("--steps", type=int, default=30, help="turns (30)")
    parser.add_argument("--entries", type=int, default=32, help="of the cache (32)")
    parser.add_argument("--json", action="store_true", help="print a JSON line")
    return parser.parse_args()


def student_of(model: Any, layers: int, width: int | None) -> Any:
    """The teacher's shape with fewer layers, or narrower."""
    if width is None:
        return dataclasses.replace(model, num_layers=layers)
    (block,) = model.pattern
    shrink = model.embed_dim // width
    ffn = dataclasses.replace(block.ffn, hidden_dim=block.ffn.hidden_dim // shrink)
    mixer = dataclasses.replace(block.mixer, num_heads=max(1, block.mixer.num_heads // shrink), num_kv_heads=None)
    block = dataclasses.replace(block, ffn=ffn, mixer=mixer)
    return dataclasses.replace(model, num_layers=layers, embed_dim=width, pattern=(block,))


def main() -> None:
    """Measures and prints."""
    args = parse()
    from llmlab.distill import Distill
    from llmlab.distill.cached_rows import with_cache
    from llmlab.distill.writing import write_cache
    from llmlab.optim import AdamW, Constant
    from llmlab.runs import Run
    from llmlab.training.program import Program

    run = Run(args.teacher)
    base = run.experiment.objective
    taught = Distill(teacher=str(args.teacher), base=base)
    experiment = dataclasses.replace(
        run.experiment,
        model=student_of(run.experiment.model, args.student_layers, args.student_width),
        objective=taught,
        optimizer=AdamW(peak_lr=1e-3, schedule=Constant()),
        train=dataclasses.replace(run.experiment.train, steps=4),
    )
    train, tokenizer = experiment.train, run.tokenizer
    dataset = experiment.data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    placement = experiment.mesh.build(jax.devices())
    model = experiment.model.with_vocabulary(tokenizer.vocab_size)
    teacher = run.experiment.model.with_vocabulary(tokenizer.vocab_size)

    def program(config: Any, objective: Any, rows: Any) -> Program:
        return Program.build(config, objective, experiment.optimizer, placement, train, rows).compiled()

    with TemporaryDirectory() as folder:
        write_cache(experiment, Path(folder) / "cache", entries=args.entries)
        cached = dataclasses.replace(taught, cache=str(Path(folder) / "cache"))
        made_with = {"steps": train.steps, "seed": train.seed, "sequence_length": train.sequence_length}
        stored = with_cache(cached, dataset, tokenizer=tokenizer, **made_with).train.batch(0)
        plain = dataset.train.batch(0)
        programs = {
            "student": (program(model, base, plain), plain),
            "distilled": (program(model, taught, plain), plain),
            "cached": (program(model, cached, stored), stored),
        }
        watched = program(teacher, base, plain)
        times = timed(programs, watched, args.steps)
    found = {name: statistics.median(each) * 1e3 for name, each in times.items()}
    sizes = {name: bytes_of(each[0].state) for name, each in programs.items()}
    shapes = {name: rows.shape for name, rows in plain.items()}
    result = {
        "device": jax.devices()[0].device_kind,
        "teacher_parameters": teacher.num_parameters(),
        "student_parameters": model.num_parameters(),
        "times_the_students_flops": teacher.flops(shapes, training=False) / model.flops(shapes, training=False),
        "milliseconds": found,
        "overhead": found["distilled"] / (found["student"] + found["teacher"]),
        "speed_up": found["distilled"] / found["cached"],
        "state_bytes": sizes,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{name:20} {value}" for name, value in result.items()))


def timed(programs: dict[str, tuple[Any, Any]], teacher: Any, turns: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns; the first of each does not count."""
    states = {name: program.initialise() for name, (program, _) in programs.items()}
    placed = {name: program.place(rows) for name, (program, rows) in programs.items()}
    params = teacher.initialise().params
    rows = teacher.place(next(iter(programs.values()))[1])
    steps = {name: program.train_step for name, (program, _) in programs.items()}
    evaluate = teacher.evaluate_step
    times: dict[str, list[float]] = {name: [] for name in (*programs, "teacher")}
    for turn in range(turns + 1):
        for name, seconds in times.items():
            began = time.perf_counter()
            if name == "teacher":
                jax.block_until_ready(evaluate(params, rows))
            else:
                states[name], metrics = steps[name](states[name], placed[name])
                jax.block_until_ready((states[name].params, metrics))
            if turn:
                seconds.append(time.perf_counter() - began)
    return times


def bytes_of(state: Any) -> int:
    """Of all arrays of a state."""
    return int(sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)))


if __name__ == "__main__":
    main()
