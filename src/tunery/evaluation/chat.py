"""A conversation in the terminal with the tuned model, the base, or both side by side."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field

from tunery.errors import ConfigError, TuneryError
from tunery.evaluation.tuned import TunedModel

HELP = """/tuned, /base, /both   who answers      /reset   forget the conversation
/help                  this text        /quit    leave (or Ctrl-D)
Ctrl-C ends an answer"""

_CLEAN = {code: "�" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters that a model may say, and that a terminal would obey."""


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
        while (line := self._next_line()) is not None and line not in ("/quit", "/exit"):
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._try(line)

    def _next_line(self) -> str | None:
        """What is typed next; None where input ends. A first Ctrl-C says how to leave, and a second one leaves."""
        typed = sys.stdin.isatty()
        for attempt in range(2):
            try:
                return input(f"\n{'+'.join(self.sides)}> " if typed else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not typed:
                    raise
                self._write("" if attempt else "\nCtrl-D or /quit leaves, and so does another Ctrl-C\n")
        self._write("\n" if typed else "")
        return None

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
        """Answer one line. Ctrl-C ends the answer of a person at a terminal; what was said until then is remembered."""
        asked: str | list[dict[str, str]] = line
        before = list(self.messages)
        if self.remembers:
            opening = [{"role": "system", "content": self.system}] if self.system and not self.messages else []
            self.messages += [*opening, {"role": "user", "content": line}]
            asked = list(self.messages)
        *_, remembered = self.sides
        said: list[str] = []
        try:
            for side in self.sides:
                self._write(f"[{side}] " if len(self.sides) > 1 else "")
                self._answer(asked, side, said if side == remembered else [])
                self._write(self._certainty(line, side) + "\n")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._write("\n(ended)\n")
        if self.remembers:
            answer = "".join(said)
            self.messages = [*self.messages, {"role": "assistant", "content": answer}] if answer else before

    def _answer(self, asked: str | list[dict[str, str]], side: str, said: list[str]) -> None:
        """Write one side's answer as it comes, and collect its pieces in `said`."""
        answer = self.tuned.stream(asked, **self.sampling)
        with self._speaking(side), contextlib.closing(answer):
            for piece in answer:
                said.append(piece)
                self._write(piece.translate(_CLEAN) if sys.stdout.isatty() else piece)

    def _speaking(self, side: str) -> contextlib.AbstractContextManager[object]:
        return self.tuned.untuned() if side == "base" else contextlib.nullcontext()

    def _certainty(self, line: str, side: str) -> str:
        if not self.tuned.renderer.labels:
            return ""
        with self._speaking(side):
            shares = self.tuned.classify([line])[0]
        return "   (" + ", ".join(f"{label} {share:.0%}" for label, share in shares.items()) + ")"

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
