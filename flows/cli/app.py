"""The entry point: commands, exit statuses, and how errors look.

0: all done. 1: the run finished, but some checkpoints failed or were rejected. 2: the call itself was
wrong and nothing was written. 130: interrupted. 141: the reader of standard output closed it (`| head`).
`diff` and `status` give 2 for trouble, because 1 is an answer of theirs. An error is one line on standard
error; a traceback appears only with `--log-level debug`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import shell_complete

from flows.cli.environment import origin_of, unread_variables
from flows.cli.help import GroupedCommands
from flows.cli.loading import LoadedCommands
from flows.cli.printing import asks_for, print_error, print_json, printable
from flows.cli.started import begin_again
from flows.interrupts import INTERRUPTED_STATUS, SignalHandler, handle_signals
from ptbin.errors import CheckpointError, PtbinError
from ptbin.installed import missing_line
from ptbin.version import __version__

EPILOG = """\b
Examples:
  ptbin inspect run1/last.ckpt
  ptbin convert run1/last.ckpt last.bin
  ptbin convert s3://models/checkpoints s3://models/weights --workers 4
  ptbin sync s3://training/runs s3://models/weights
  ptbin migrate mlflow+http://127.0.0.1:5000 s3://models/registry --layout hf
  ptbin verify s3://models/weights
  ptbin diff old/last.bin new/last.bin
  ptbin restore last.bin last.pt
  ptbin status s3://training/runs s3://models/weights
  ptbin runs s3://models/weights
  ptbin metrics s3://models/weights --textfile ptbin.prom
  ptbin acknowledge weights/ cut.pt --reason 'issue 412' --until 2026-12-31

\b
Exit status: 0 all done; 1 some checkpoints failed or were rejected;
2 the call was wrong, nothing was written; 130 interrupted;
141 the reader of standard output closed it (as by | head).

Every option can come from the environment: PTBIN_WORKERS=4 for all commands, PTBIN_CONVERT_WORKERS=4 for one.

\b
Completion in a shell (or zsh_source, fish_source):
  eval "$(_PTBIN_COMPLETE=bash_source ptbin)"

ptbin COMMAND --help has examples and all options of a command."""

OUTPUT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EPIPE}
CLOSED_PIPE_STATUS = 128 + signal.SIGPIPE
"""What a shell reports of a program that SIGPIPE ended: `git log | head` has it too."""
ANSWERING = {"diff", "status"}
"""Commands that answer with status 1, so that trouble has to be 2."""
COMPLETION_VARIABLE = "_PTBIN_COMPLETE"
_commands = 0


COMMANDS = {
    "Checkpoints": ("inspect", "convert", "verify", "diff", "restore"),
    "Whole stores": ("sync", "migrate", "status"),
    "Runs and operation": ("runs", "acknowledge", "metrics", "deployments"),
}
"""What each heading of the help names; `flows.cli.<name>_command` has the command."""


@click.group(
    cls=GroupedCommands,
    groups=COMMANDS,
    commands=LoadedCommands(name for names in COMMANDS.values() for name in names),
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="ptbin", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn PyTorch checkpoints into clean, proven weights, without running their code."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    status = run(arguments)
    early = sys.modules.get("flows.prefect.early")
    if early is not None and early.is_starting():
        # A thread that is importing Prefect cannot be ended: an interpreter that waited for none of its kind
        # aborts on its way out. The server that was begun ends with this process's end of its input.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    # On its way out the interpreter would look for garbage in all modules, several times: 0.3 s with s3fs.
    gc.freeze()
    sys.exit(status)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if instruction := os.environ.get(COMPLETION_VARIABLE):  # as click's own `main` has it
        return shell_complete(cli, {}, "ptbin", COMPLETION_VARIABLE, instruction)
    global _commands  # noqa: PLW0603 - there is one at a time
    _commands += 1
    if _commands > 1:
        begin_again()
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    try:
        status = _answered(words)
        sys.stdout.flush()
    except OSError as error:
        # Of standard output: what the work itself reads and writes has errors of ptbin's own.
        _discard(sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE_STATUS
        print_error(f"standard output cannot be written: {error.strerror}")
        return _trouble(words)
    return status


def _answered(words: Sequence[str]) -> int:
    """The exit status, when the command or an error has had its say.

    Raises:
        OSError: standard output cannot be written.
    """
    signals = SignalHandler()
    try:
        with handle_signals(signals.handle):
            _quieten_libraries(words)
            # Not `cli.main`: it would answer an interrupt with an empty line.
            with cli.make_context("ptbin", list(words)) as context:
                if line := unread_variables(cli.commands.values(), os.environ):
                    print_error(line, kind="ptbin: warning")
                status = cli.invoke(context)
    except click.exceptions.Exit as error:  # --help and --version
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.ClickException as error:
        return _failed(words, "usage_error", _usage_line(error), 2)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted(words)
    except PtbinError as error:
        if signals.interrupted:
            return _interrupted(words)
        _print_traceback(words)
        return _failed(words, error.reason, str(error), 1 if isinstance(error, CheckpointError) else 2)
    except ModuleNotFoundError as error:
        _print_traceback(words)
        return _failed(words, "not_installed", missing_line(str(error.name), "this command"), 2)
    except Exception as error:  # the last line of defence: a line, not a traceback
        if signals.interrupted:
            return _interrupted(words)
        if isinstance(error, OSError) and error.errno in OUTPUT_ERRNOS:
            raise
        _print_traceback(words)
        detail = f"{type(error).__name__}: {error} (a fault in ptbin; --log-level debug shows where)"
        return _failed(words, "internal_error", detail, _trouble(words))
    return status if isinstance(status, int) else 0


def _trouble(words: Sequence[str]) -> int:
    return 2 if words and words[0] in ANSWERING else 1


class _StandardError(io.FileIO):
    """Standard error as long as someone reads it: a run does not end because its log does."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            _discard(self.fileno())
            return len(data)


def _discard(descriptor: int) -> None:
    """What is written there goes nowhere from now on, what is still in buffers at exit included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _open_streams() -> None:
    """Let every text be written: one that was closed takes all, and what a locale lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if (standard := sys.__stderr__) is not None and sys.stderr is standard:
        raw = io.BufferedWriter(_StandardError(standard.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, standard.encoding, "backslashreplace", line_buffering=True)


def _quieten_libraries(words: Sequence[str]) -> None:
    """Drop what store libraries log, unless it is asked for: their errors are reported by ptbin."""
    if not asks_for(words, "--log-level", "debug") and not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())


def _interrupted(words: Sequence[str]) -> int:
    print_error("interrupted", kind="ptbin")
    if _wants_json(words):
        print_json(
            {"reason": "interrupted", "detail": "nothing was begun", "exit_status": INTERRUPTED_STATUS}
        )
    return INTERRUPTED_STATUS


def _failed(words: Sequence[str], reason: str, detail: str, status: int) -> int:
    """An error that leaves no summary: a line for people, and the document that `--json` promises."""
    if status == 2:
        detail += origin_of(cli.commands, words, detail)
    print_error(detail)
    if _wants_json(words):
        print_json({"reason": reason, "detail": printable(" ".join(detail.split())), "exit_status": status})
    return status


def _wants_json(words: Sequence[str]) -> bool:
    # From the words themselves: an error may come before any option was parsed.
    return "--json" in words or os.environ.get("PTBIN_JSON", "") in {"1", "true", "yes"}


def _usage_line(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "ptbin"
    message = error.format_message().removesuffix(".")
    if "unexpected extra argument" in message:
        takes = context.command.params if context is not None else []
        message += "; quote a glob ('runs/*.pt'), so that ptbin and not the shell expands it"
        if any(option.name == "files_from" for option in takes):
            message += ", or name files below one SOURCE with --files-from"
    return f"{message} (see {command} --help)"


def _print_traceback(words: Sequence[str]) -> None:
    if asks_for(words, "--log-level", "debug"):
        traceback.print_exc()
