"""The `llmlab` command: finds the command's module, runs its main, and turns errors into messages and exit codes.

Nothing heavy is imported here, so that `llmlab --help` answers at once; a command imports what it needs.

Exit codes: 0 done, 1 failed, 2 the user's error, 42 preempted (resumable), 130 interrupted.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import llmlab

# Section -> command -> (module with main(argv) -> exit code, summary).
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Experiment": {
        "train": ("llmlab.commands.train", "train the model of an experiment file; the same command resumes"),
        "config": ("llmlab.commands.config", "print an experiment's resolved config, or how two experiments differ"),
        "plan": ("llmlab.commands.plan", "compile it for TPUs that are not here: memory, FLOPs, collectives, roofline"),
        "schedule": ("llmlab.commands.schedule", "draw an experiment's learning rate over the run"),
    },
    "Studies": {
        "sweep": ("llmlab.commands.sweep", "run an experiment over many values, by many workers, and find the best"),
        "ablate": ("llmlab.commands.ablate", "compare variants with a baseline over seeds: a verdict and a report"),
        "scaling": (
            "llmlab.commands.scaling",
            "fit scaling laws to a family of models; learning rates across widths",
        ),
    },
    "Smaller models": {
        "distill": ("llmlab.commands.distill", "train a student of a teacher, and say what the teacher was worth"),
    },
    "Look at results": {
        "runs": ("llmlab.commands.runs", "list runs and their results in a table"),
        "plot": ("llmlab.commands.plot", "write the loss curves of runs to a PNG file"),
        "generate": ("llmlab.commands.generate", "continue a prompt with a trained model"),
        "serve": ("llmlab.commands.serve", "serve a model over HTTP as OpenAI's interface has it, with a chat page"),
    },
    "Models": {
        "models": ("llmlab.commands.models", "list the architecture families, their sizes and what they are for"),
        "info": ("llmlab.commands.info", "print a model's layer table: shapes, parameters, axes, FLOPs"),
        "convert": ("llmlab.commands.convert", "convert between runs and Hugging Face directories, either way"),
    },
    "Tools": {
        "tokenizer": ("llmlab.commands.tokenizer", "train a tokenizer, encode and decode with it, look inside it"),
    },
}

EXAMPLES = (
    ("llmlab train experiments/quickstart.py", "four minutes on a laptop"),
    ("llmlab train experiments/quickstart.py --help", "every value that can be changed"),
    ("llmlab train experiments/quickstart.py --optimizer.peak-lr 1e-3", "change one"),
    ("llmlab config runs/A runs/B", "what two runs disagree on"),
    ('llmlab generate runs/A --prompt "def main("', "let it write"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here at the latest, not while the interpreter exits
        return code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_users_error(error):
            print(f"{_style('error:', '1;31', sys.stderr.isatty())} {error}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print("this is a bug in llmlab or in a library, not in your input", file=sys.stderr)
        return 1


def is_users_error(error: Exception) -> bool:
    """Whether an exception describes the user's input: a file problem, or a ValueError that llmlab itself raised.

    A ValueError out of the depths of a library is a bug, and needs its traceback to be found.
    """
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    raised_in = Path(innermost.tb_frame.f_code.co_filename) if innermost is not None else Path()
    return isinstance(error, ValueError) and Path(llmlab.__file__).parent in raised_in.parents


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text(color=_colorful()))
        return 0
    if name in ("-V", "--version"):
        print(f"llmlab {llmlab.__version__}")
        return 0
    commands = {command: module for section in COMMANDS.values() for command, (module, _) in section.items()}
    if name not in commands:
        raise ValueError(_unknown(name, list(commands)))
    return importlib.import_module(commands[name]).main(arguments[1:])


def _unknown(name: str, commands: list[str]) -> str:
    if name.startswith("-"):
        return f"there is no option {name} before a command; llmlab --help lists the commands"
    if name.endswith(".py"):
        return f"{name} is no command; did you mean llmlab train {name}?"
    near = difflib.get_close_matches(name, commands, n=2, cutoff=0.6)
    way_out = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(commands)}"
    return f"there is no command {name!r}; {way_out}"


def help_text(*, color: bool) -> str:
    """What `llmlab --help` prints."""
    width = max(len(command) for section in COMMANDS.values() for command in section)
    lines = [
        f"{_style('llmlab', '1;36', color)} {llmlab.__version__}: a research lab for language models in JAX and Flax",
        "",
        f"{_style('Usage', '1', color)}  llmlab COMMAND ...      llmlab COMMAND --help",
    ]
    for title, section in COMMANDS.items():
        lines += ["", _style(title, "1", color)]
        lines += [f"  {_style(name.ljust(width), '36', color)}  {text}" for name, (_, text) in section.items()]
    lines += ["", _style("Examples", "1", color)]
    width = max(len(example) for example, _ in EXAMPLES)
    lines += [f"  {example.ljust(width)}  {_style(f'# {text}', '2', color)}" for example, text in EXAMPLES]
    lines += [
        "",
        "An experiment is one Python file; its values are flags, its parts are classes you swap in the file.",
        "Exit codes: 0 done, 1 failed, 2 your input, 42 preempted (run again to resume), 130 interrupted.",
    ]
    return "\n".join(lines)


def _colorful() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _style(text: str, code: str, color: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if color else text
