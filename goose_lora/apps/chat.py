"""``goose-lora chat``: base, SFT and PPO of a run answer the same, in a terminal or on a page."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from goose_lora.apps import gradio_pages
from goose_lora.apps.chat_page import serve_chat
from goose_lora.apps.session import PolicySession, RunInfo, Turn, check_sampling, inspect_run
from goose_lora.errors import UserError, printable

ANEW = "/new"  # the word that begins another conversation
AGAIN = "/again"  # the word that asks for another sample


def chat(
    run: str,
    *,
    roles: Sequence[str] = (),
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    base: str | None = None,
    serve: bool = False,
    port: int | None = None,
) -> None:
    """Load ``run`` and answer each line of stdin, or with ``serve`` what is asked on a page.

    It ends with stdin, the page with Ctrl-C.

    Args:
        roles: which of base, sft and ppo answer, in this order; all that the run has if empty.
        temperature: 0 for greedy replies; the run's own if unset.
        max_new_tokens: most tokens of a reply; the run's own if unset.
        seed: of the sampling; a role's reply does not depend on which others are asked.
        base: where the base is, if not where the run had it.

    Raises:
        UserError: there is no run, it lacks a role, or nobody can sample with the settings; before
            anything is loaded.
    """
    # What can be known before a weight is read
    check_sampling(temperature, max_new_tokens)
    if port is not None and not serve:
        raise UserError(f"--port {port} is the page's. Add --serve.")
    if serve:
        gradio_pages.require(port)
    info = inspect_run(run, base=base)
    names = choose_roles(info, roles)
    info.check(tokens=max_new_tokens or info.response_tokens)

    session = PolicySession(info, temperature=temperature, max_new_tokens=max_new_tokens)
    if serve:
        serve_chat(session, names, seed=seed, port=port)
    else:
        _chat_in_terminal(session, names, seed=seed)


def _chat_in_terminal(session: PolicySession, names: Sequence[str], *, seed: int) -> None:
    """Answer lines as they are typed, or each line of a pipe as a conversation of its own."""
    # A pipe has no one to be told what to type
    conversation = Conversation(session, names, seed=seed, write=_to_stdout)
    interactive = sys.stdin.isatty()
    lines = readable(sys.stdin)
    if interactive:
        lines = readable(_typed())
        how = f"Type the start of a text; each model continues it. {AGAIN} gives another sample"
        if session.info.chat:
            how = f"Write a message; {AGAIN} gives another sample, {ANEW} begins another conversation"
        _to_stdout(f"{session.info.describe(names)}\n{how}; Ctrl-D ends.\n")
    try:
        for line in lines:
            conversation.hear(line.rstrip("\r\n"), alone=not interactive)
    except KeyboardInterrupt:
        _to_stdout("\n")


def choose_roles(info: RunInfo, roles: Sequence[str]) -> list[str]:
    """Return ``roles``, each once, or all roles of the run if empty.

    Raises:
        UserError: the run lacks one.
    """
    missing = [name for name in roles if name not in info.roles]
    if missing:
        raise UserError(
            f"--roles {','.join(roles)}: {info.folder} has no {missing[0]}. There are"
            f" {', '.join(info.roles)}."
        )
    return list(dict.fromkeys(roles)) or list(info.roles)


class Conversation:
    """The turns of each role, shown one role after the other, word by word."""

    def __init__(
        self,
        session: PolicySession,
        names: Sequence[str],
        *,
        seed: int,
        write: Callable[[str], None],
    ):
        self.session, self.names, self.seed, self.write = session, list(names), seed, write
        self.width = max(map(len, self.names)) + 2  # of the column of names
        self.asked = 0  # questions so far: each has a seed of its own
        self.forget()

    def forget(self) -> None:
        """Begin anew: no role remembers a turn."""
        self.turns: dict[str, list[Turn]] = {name: [] for name in self.names}
        self.last: tuple[str, dict[str, list[Turn]]] | None = None  # what was asked, after which turns

    def hear(self, line: str, *, alone: bool = False) -> None:
        """Answer ``line``; with ``alone`` as the only one of its conversation.

        An error is said, and the next line can be answered.
        """
        # Empty lines ask nothing, and a question of a pipe is echoed
        if not line.strip():
            return
        if alone:
            self.write(f"> {line}\n")
        word = line.strip()
        if word == AGAIN:
            # In place of the last replies, which no role remembers then
            if self.last is None:
                self.write(f"(nothing was asked yet, of which {AGAIN} could give another sample)\n")
                return
            line, self.turns = self.last
        elif alone or word == ANEW:
            self.forget()
        if word == ANEW:
            return
        self.last = line, dict(self.turns)

        # One role after the other
        for name in self.names:
            self.write(name.ljust(self.width))
            try:
                self._answer(name, line)
            except UserError as error:
                self.write(f"({error})\n")
        self.write("\n")
        self.asked += 1

    def _answer(self, name: str, line: str) -> None:
        prompt, shown = self.session.info.prompt_after(self.turns[name], line)
        self.write(shown)
        # A seed a question, the same for all roles: what they say differs by the role alone
        (reply,) = self.session.reply(name, prompt, seed=self.seed + self.asked, write=self.write)
        self.write(f"\n{'':{self.width}}({reply.facts()})\n")
        if isinstance(prompt, list):
            self.turns[name] = [*prompt, {"role": "assistant", "content": reply.text}]


def _to_stdout(text: str) -> None:
    # Flushed, since a reply is shown as it is written; what a model writes moves no cursor
    sys.stdout.write(printable(text, keep="\n\t"))
    sys.stdout.flush()


def readable(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines; raise UserError for one that is not in the console's encoding."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(
            f"stdin: is not {error.encoding}, which the console is said to have: {error.reason}. Set"
            " PYTHONIOENCODING=utf-8, or write it in that encoding."
        ) from error


def _typed() -> Iterator[str]:
    """Yield lines with a prompt and the terminal's editing, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            _to_stdout("\n")
            return
