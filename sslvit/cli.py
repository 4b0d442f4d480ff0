"""The `sslvit` command line. torch is imported only inside a command (commands/)."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import sslvit
from sslvit.commands import evaluation, import_export, packing, pixels, runs, training
from sslvit.commands.arguments import (
    Function,
    UnknownCommand,
    add_options,
    find_command,
    options_class,
    read_options,
)
from sslvit.environment import explain
from sslvit.files import explain_os_error, printable
from sslvit.messages import messages_of
from sslvit.plugins import use_plugin
from sslvit.stopping import (
    TRY_AGAIN,
    Preempted,
    RankLost,
    check_one_process,
    finishing,
    is_first_process,
    requeue,
    stopping_at_once,
)

MAX_MESSAGE = 1000  # characters
# Iterations that a waiting OpenMP thread spins before it sleeps. The default takes milliseconds, during which no other
# process can use its core (docs/performance.md).
SPIN_COUNT = "10000"
COMMANDS: Mapping[str, Function] = {
    "demo": training.run_demo,
    "shards pack": packing.run_pack,
    "shards index": packing.run_index,
    "shards check": packing.run_check,
    "shards info": packing.run_info,
    "palette": packing.run_palette,
    "pretrain": training.run_pretrain,
    "resume": training.run_resume,
    "branch": runs.run_branch,
    "finetune": training.run_finetune,
    "plan": training.run_plan,
    "replay": training.run_replay,
    "runs": runs.run_runs,
    "report": runs.run_report,
    "sweep": runs.run_sweep,
    "recipes": training.run_recipes,
    "settings": training.run_settings,
    "probe": evaluation.run_probe,
    "knn": evaluation.run_knn,
    "compare": evaluation.run_compare,
    "health": evaluation.run_health,
    "embed": evaluation.run_embed,
    "segment": evaluation.run_segment,
    "show": evaluation.run_show,
    "bench": evaluation.run_bench,
    "sample": pixels.run_sample,
    "likelihood": pixels.run_likelihood,
    "export": import_export.run_export,
    "import": import_export.run_import,
}
GROUPS = {"shards": "Make and inspect WebDataset shards."}
TRAINING = {"pretrain", "finetune", "resume"}
WITH_TRAINING = {*TRAINING, "demo", "bench", "sweep"}
ON_RANKS = {*TRAINING, "plan", "replay", "probe", "knn", "compare", "health", "embed"}  # also in processes of torchrun
# printed after "interrupted", for commands that keep finished work
KEPT = {
    "demo": "; what is done is kept in its folder: give the same command with --overwrite to begin anew",
    "shards pack": "; shards that are finished are kept: the same command goes on with the others",
    "resume": " before the first step; its checkpoint is as it was: give the same command again",
    "probe": "; features of complete passes are in the cache: the same command goes on from them",
    "knn": "; features of complete passes are in the cache: the same command goes on from them",
    "compare": "; features of complete passes are in the cache: the same command goes on from them",
    "sweep": "; runs that are finished are kept: the same command goes on with the others",
    "bench": "; scores that are finished are kept: the same command goes on with the others",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. User errors are printed as one line, without a traceback."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    with finishing(is_process_ending=arguments is None):  # a late signal changes neither exit code nor requeue
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    options = None
    when = " before the first step, so there is nothing to save yet" if set(arguments[:1]) & TRAINING else ""
    again = "give the same command again"
    kept = next((text for name, text in KEPT.items() if arguments[: name.count(" ") + 1] == name.split()), None)
    try:
        with stopping_at_once(f"{when}: {again}", kept or f"{when or '; nothing is written'}: {again}"):
            function, options = read_command(arguments)
            lasts = bool(set(arguments[:1]) & WITH_TRAINING)
            with messages_of(options.quiet, is_json=getattr(options, "json", False), outlives_reader=lasts):
                if options.plugin:
                    use_plugin(options.plugin)
                code = function(options)
            sys.stdout.flush()
    except UnknownCommand as error:
        print(f"sslvit: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        print(f"sslvit: error: {explain(error) or last_words(error)}", file=sys.stderr)
        return 1
    except (Preempted, RankLost) as error:
        print(f"sslvit: {error}", file=sys.stderr)
        is_early = isinstance(error, Preempted) and not error.is_requeued
        if is_early and is_first_process() and training.wants_requeue(options):
            requeue()
        return TRY_AGAIN
    except KeyboardInterrupt as error:
        if is_first_process():
            print(f"sslvit: {error or 'interrupted'}", file=sys.stderr)
        return 130
    return code or 0


def read_command(arguments: list[str]) -> tuple[Function, Any]:
    """Parse a command line into the command's function and its options; exits the process on --help and --version."""
    name, rest = find_command(COMMANDS, arguments)
    parser = make_parser(name, has_help=bool({"-h", "--help"} & set(rest)))
    if name not in COMMANDS:
        parser.parse_args(arguments)
    function = COMMANDS[name]
    options = read_options(parser.get_default("parsers")[name], options_class(function), f"sslvit {name}", rest)
    if name not in ON_RANKS:
        check_one_process(name)
    return function, options


def last_words(error: BaseException) -> str:
    """The error message in one line, without the traceback that a DataLoader worker adds to it."""
    text = (explain_os_error(error) if isinstance(error, OSError) else None) or str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return printable(" ".join(text.split()), MAX_MESSAGE) or type(error).__name__


def make_parser(only: str | None = None, has_help: bool = True) -> argparse.ArgumentParser:
    """Make the parser of all commands.

    Args:
        only: Add options to this command only; by default all commands get theirs, as shell completion needs.
        has_help: Whether to add help texts to the options.
    """
    parser = argparse.ArgumentParser(
        "sslvit", description="Self-supervised pretraining for vision transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sslvit {sslvit.__version__}")
    parsers: dict[str, argparse.ArgumentParser] = {}
    parser.set_defaults(parsers=parsers)
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for name, function in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group], allow_abbrev=False)
            groups[group] = inner.add_subparsers(dest="action", required=True, metavar="ACTION")
        kind = options_class(function)
        text, _, example = (inspect.getdoc(kind) or "").partition("\n\nExample: ")
        sub = groups[group].add_parser(
            word, help=text.splitlines()[0], description=text, epilog=f"Example: {example}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        parsers[name] = sub
        if only in (None, name):
            add_options(sub, kind, has_help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
