"""The arguments of ``prefixkit``; nothing here imports torch, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import NoReturn, TypeAlias

from prefixkit import __version__
from prefixkit.cli.wrong import CommandError
from prefixkit.serving.targets import TARGETS

FORMATS = ("prefixkit", "peft")
MODEL = "folder of a model, or its name on the hub"
TASKS = (
    "class of the model: causal-lm, seq2seq-lm, masked-lm, sequence-classification, token-classification, "
    "question-answering, multiple-choice, image-classification, audio-classification, body, or any class of "
    "transformers; by default the one the model's config names"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are the command's."""

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`CommandError`."""
        raise CommandError(f"{message}; `{self.prog} --help` shows what is possible")


class OfAModel(argparse.Action):
    """Stores a value, and the option itself among those that say nothing of a saved prefix."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Called for each option that is there."""
        setattr(namespace, self.dest, values)
        namespace.of_a_model = (*namespace.of_a_model, option)


def parser() -> Parser:
    """The parser of the command with all its subcommands."""
    top = Parser(prog="prefixkit", description="Prefix tuning and p-tuning v2 for transformers models.")
    top.add_argument("--version", action="version", version=f"prefixkit {__version__}")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_plugins, _inspect, _train, _generate, _convert, _export, _verify):
        add(commands)
    return top


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Arguments: TypeAlias = "Parser | argparse._ArgumentGroup"
Action: TypeAlias = str | type[argparse.Action]


def _command(commands: Commands, name: str, text: str, example: str) -> Parser:
    made = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Suppressed, so that it does not undo one that stands in front of the subcommand.
    made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")
    return made


def _plugins(commands: Commands) -> None:
    _command(
        commands,
        "plugins",
        "list installed adapters and methods, and what is broken",
        "  prefixkit plugins",
    )


def _inspect(commands: Commands) -> None:
    made = _command(
        commands,
        "inspect",
        "show where a prefix goes in a model, or what a saved prefix is; no weights are read",
        "  prefixkit inspect path/or/name --num-virtual-tokens 20\n  prefixkit inspect runs/my-prefix",
    )
    made.add_argument(
        "place", type=_place, metavar="MODEL or PREFIX", help=f"{MODEL}; or a saved prefix, here or on the hub"
    )
    made.add_argument("--revision", help="branch, tag or commit on the hub")
    made.set_defaults(of_a_model=())
    group = made.add_argument_group("of a MODEL; a saved prefix has its own")
    _add_task(group, OfAModel)
    _add_prefix(group, OfAModel)
    group.add_argument("--positions", action=OfAModel, default="shift", help="shift or none (shift)")
    group.add_argument("--window", action=OfAModel, default="pinned", help="pinned or slide (pinned)")
    group.add_argument("--engine", action=OfAModel, default="auto", help="auto, attention or cache (auto)")
    group.add_argument(
        "--stacks", action=OfAModel, nargs="+", metavar="STACK", help="encoder, decoder, cross (all there are)"
    )


def _convert(commands: Commands) -> None:
    made = _command(
        commands,
        "convert",
        "write a prefix in another format",
        "  prefixkit convert peft-folder my-prefix --to prefixkit\n  prefixkit convert my-prefix peft-folder --to peft",
    )
    _add_source(made)
    made.add_argument("target", metavar="DST", type=_path, help="folder to write")
    made.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="prefixkit: a checkpoint of prefixkit; peft: one of PEFT",
    )
    _add_base(made)
    _add_task(made)
    made.add_argument("--fold", action="store_true", help="with --to prefixkit: leave out an MLP, which only trains")
    _add_overwrite(made)
    _add_revision(made, "SRC")


def _export(commands: Commands) -> None:
    made = _command(
        commands,
        "export",
        "write a prefix for a program that serves it",
        "  prefixkit export my-prefix runs/llama-cpp --to llama.cpp --gguf base.gguf\n"
        "  prefixkit export user/my-prefix prefix.safetensors --to kv --base path/or/name",
    )
    _add_source(made)
    made.add_argument("target", metavar="DST", type=_path, help="folder to write; with --to kv, the file")
    made.add_argument(
        "--to",
        choices=tuple(TARGETS),
        required=True,
        help="kv: a plain file of keys and values; llama.cpp: states that a slot restores; vllm: for the "
        "connector of prefixkit-vllm; onnx: a graph for onnxruntime; pt2: a program of torch.export",
    )
    _add_base(made)
    _add_task(made)
    made.add_argument("--positions", help="with --to kv: shift or none (the prefix's own)")
    _add_gguf(made)
    made.add_argument("--baked", action="store_true", help="with --to onnx: a graph with the prefix in it as well")
    made.add_argument(
        "--max-cache-len",
        type=_count,
        metavar="N",
        help="with --to pt2: places for the virtual tokens and all of a text (512)",
    )
    _add_overwrite(made)
    _add_revision(made, "SRC")


def _verify(commands: Commands) -> None:
    made = _command(
        commands,
        "verify",
        "run a program with a prefix that `prefixkit export` wrote, and compare it with the model",
        "  prefixkit verify my-prefix runs/llama-cpp 'name : Zizzi | food : Chinese' --gguf base.gguf",
    )
    _add_source(made)
    made.add_argument("target", metavar="DST", type=_path, help="what `prefixkit export` wrote of it")
    made.add_argument("texts", metavar="TEXT", nargs="+", help="sources, as of `prefixkit generate`")
    _add_base(made)
    _add_gguf(made)
    made.add_argument("--python", type=_path, metavar="FILE", help="with vllm: of the environment that has vLLM")
    made.add_argument("--engine", type=_json, metavar="JSON", help="with vllm: further options of vllm.LLM, an object")
    made.add_argument("--server", metavar="URL", help="with llama.cpp: a running llama-server, in place of --gguf")
    made.add_argument("--max-new-tokens", type=_count, default=16, metavar="N", help="(16)")
    _add_revision(made, "SRC")


def _train(commands: Commands) -> None:
    made = _command(
        commands,
        "train",
        "train a prefix on pairs of texts; with test data, print BLEU before and after",
        "  prefixkit train path/or/name --train pairs.jsonl --test test.jsonl \\\n"
        "      --source-field question --target-field answer --output runs/my-prefix",
    )
    made.add_argument("model", type=_place, metavar="MODEL", help=MODEL)
    made.add_argument("--train", type=_path, required=True, metavar="FILE", help="JSON lines, plain or .gz")
    made.add_argument("--test", type=_path, metavar="FILE", help="JSON lines to score before and after")
    made.add_argument("--output", type=_path, required=True, metavar="DIR", help="folder to save the prefix to")
    _add_overwrite(made)
    _add_fields(made)
    _add_prefix(made)
    made.add_argument("--epochs", type=_above_zero, default=2.0, help="(2)")
    made.add_argument("--learning-rate", type=_above_zero, help="peak (what suits the method)")
    made.add_argument("--max-train", type=_count, metavar="N", help="use only so many pairs")
    made.add_argument("--max-test", type=_count, metavar="N", help="use only so many test inputs")
    made.add_argument("--seed", type=_seed, default=0, help="(0)")
    made.add_argument("--batch-size", type=_count, default=32, help="(32)")


def _generate(commands: Commands) -> None:
    made = _command(
        commands,
        "generate",
        "write a text for each source, with a trained prefix; with references, print BLEU",
        "  prefixkit generate runs/my-prefix 'name : Zizzi | food : Chinese'\n"
        "  prefixkit generate user/my-prefix --input test.jsonl --source-field question --output answers.jsonl",
    )
    made.add_argument("prefix", type=_place, metavar="PREFIX", help="a saved prefix: a folder, or a name on the hub")
    made.add_argument("texts", metavar="TEXT", nargs="*", help="sources")
    _add_base(made)
    made.add_argument("--input", type=_path, metavar="FILE", help="JSON lines with sources, plain or .gz")
    made.add_argument("--score", action="store_true", help="BLEU against the target field of --input")
    made.add_argument("--output", type=_path, metavar="FILE", help="write JSON lines there, not to the terminal")
    _add_overwrite(made)
    _add_fields(made)
    made.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="(64)")
    made.add_argument("--batch-size", type=_count, default=64, help="(64)")
    _add_revision(made, "PREFIX")


def _place(text: str) -> str:
    """A path or a name, which nobody means to be empty: that would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a place")
    return text


def _path(text: str) -> Path:
    """A path."""
    return Path(_place(text))


def _json(text: str) -> dict[str, object]:
    """A JSON object."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as \'{{"dtype": "float32"}}\'')


def _count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _above_zero(text: str) -> float:
    """A finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")


def _seed(text: str) -> int:
    """What torch and numpy both take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number between 0 and 2**32 - 1")
    return int(text)


def _add_overwrite(made: Parser) -> None:
    made.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_fields(made: Parser) -> None:
    made.add_argument("--source-field", default="source", metavar="NAME", help="(source)")
    made.add_argument("--target-field", default="target", metavar="NAME", help="(target)")


def _add_prefix(made: Arguments, action: Action = "store") -> None:
    made.add_argument("--method", action=action, default="p-tuning-v2", help="an installed method (p-tuning-v2)")
    made.add_argument(
        *("-P", "--num-virtual-tokens"),
        action=action,
        type=_count,
        default=20,
        metavar="P",
        help="length of the prefix (20)",
    )


def _add_source(made: Parser) -> None:
    made.add_argument(
        "source", type=_place, metavar="SRC", help="what prefixkit.load reads: a folder, a file, a name on the hub"
    )


def _add_revision(made: Parser, of: str) -> None:
    made.add_argument("--revision", help=f"branch, tag or commit of {of} on the hub")


def _add_gguf(made: Parser) -> None:
    made.add_argument("--gguf", type=_path, metavar="FILE", help="with llama.cpp: the base that it runs")


def _add_base(made: Parser) -> None:
    made.add_argument("--base", type=_place, metavar="MODEL", help=f"{MODEL} (the one that the prefix names)")


def _add_task(made: Arguments, action: Action = "store") -> None:
    made.add_argument("--task", action=action, help=TASKS)
    made.add_argument(
        "--num-labels", action=action, type=_count, metavar="N", help="outputs of a classifier (what the config says)"
    )
