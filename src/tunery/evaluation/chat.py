"""A conversation in the terminal with the tuned model, the base, or both side by side."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field

from tunery.errors import ConfigError, TuneryError
from tunery.evaluation.tuned import TunedModel

HELP = """/tuned, /base, /both   who answers      /reset   forget the conversation
/help                  this text        /quit    leave (or Ctrl-D)"""


@dataclass
class Conversation:
    """Reads lines from stdin and answers on stdout.

    Attributes:
        tuned: the loaded run.
        system: system message, or None for the run's own.
        sampling: see tunery.inference.generate.Sampling.
        sides: who answers: "tuned", "base", or both. With both, the tuned answer is the one remembered.
    """

    tuned: TunedModel
    system: str | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    sides: tuple[str, ...] = ("tuned",)
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """A conversation goes on over several turns; the other kinds of task answer each line by itself."""
        return self.tuned.kind.converses

    def run(self) -> None:
        """Until /quit or the end of input.

        Raises:
            ConfigError: a system message was given, and the run's kind of task takes none.
        """
        if self.system and not self.remembers:
            raise ConfigError(
                "--system is for conversations; this run puts each line as its training rows were", "leave it out"
            )
        self._write(f"{self.tuned.task.name}: {self.tuned.kind.chat_hint} /help lists the commands.\n")
        while True:
            try:
                line = input(f"\n{'+'.join(self.sides)}> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._try(line)

    def _command(self, line: str) -> None:
        choices = {"/tuned": ("tuned",), "/base": ("base",), "/both": ("base", "tuned")}
        if line in choices:
            self.sides = choices[line]
            self._write(f"{' and '.join(self.sides)} will answer\n")
        elif line == "/reset":
            self.messages.clear()
            self._write("forgotten\n")
        else:
            self._write(("" if line == "/help" else f"{line} is not a command\n") + HELP + "\n")

    def _try(self, line: str) -> None:
        """Answer, or say why not and forget the line."""
        before = list(self.messages)
        try:
            self.reply(line)
        except TuneryError as error:
            self.messages = before
            self._write(f"{error}\n  /reset forgets the conversation\n" if self.remembers else f"{error}\n")

    def reply(self, line: str) -> None:
        """Answer one line."""
        asked: str | list[dict[str, str]] = line
        if self.remembers:
            opening = [{"role": "system", "content": self.system}] if self.system and not self.messages else []
            self.messages += [*opening, {"role": "user", "content": line}]
            asked = list(self.messages)
        answer = ""
        for side in self.sides:
            context = self.tuned.untuned() if side == "base" else contextlib.nullcontext()
            self._write(f"[{side}] " if len(self.sides) > 1 else "")
            pieces = []
            with context:
                for piece in self.tuned.stream(asked, **self.sampling):
                    pieces.append(piece)
                    self._write(piece)
            answer = "".join(pieces)
            self._write(self._certainty(line, side) + "\n")
        if self.remembers:
            self.messages.append({"role": "assistant", "content": answer})

    def _certainty(self, line: str, side: str) -> str:
        if not self.tuned.renderer.labels:
            return ""
        with self.tuned.untuned() if side == "base" else contextlib.nullcontext():
            shares = self.tuned.classify([line])[0]
        return "   (" + ", ".join(f"{label} {share:.0%}" for label, share in shares.items()) + ")"

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
