"""``goose-lora chat``: what base, SFT and PPO of a run answer to the same, in the terminal or on a
local page."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from goose_lora.apps import gradio_pages
from goose_lora.apps.chat_page import serve_chat
from goose_lora.apps.session import PolicySession, RunInfo, check_sampling, inspect_run
from goose_lora.errors import UserError

ANEW = "/new"


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
    """Load ``run`` and answer line after line from stdin until it ends; or with ``serve`` on a page
    of this machine, until Ctrl-C.

    Args:
        roles: which of base, sft and ppo answer, in this order; all that the run has if empty.
        temperature: 0 for greedy replies; the run's own if unset.
        max_new_tokens: most tokens of a reply; the run's own if unset.
        seed: of the sampling; a role's reply does not depend on which others are asked.
        base: where the base is, if not where the run had it.

    Raises:
        ValueError: no run, roles that it does not have, or settings that nobody can sample with;
            before anything is loaded.
    """
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
        return
    interactive = sys.stdin.isatty()
    conversation = Conversation(session, names, seed=seed, write=_to_stdout)
    if interactive:
        how = (
            f"Write a message; {ANEW} begins another conversation"
            if info.chat
            else "Write a beginning, which is gone on from"
        )
        _to_stdout(f"{info.describe(names)}\n{how}; Ctrl-D ends.\n")
    try:
        for line in _typed() if interactive else sys.stdin:
            conversation.hear(line.rstrip("\r\n"), alone=not interactive)
    except KeyboardInterrupt:
        _to_stdout("\n")


def choose_roles(info: RunInfo, roles: Sequence[str]) -> list[str]:
    """``roles``, or all that there are.

    Raises:
        ValueError: one that the run does not have.
    """
    missing = [name for name in roles if name not in info.roles]
    if missing:
        raise UserError(
            f"--roles {','.join(roles)}: {info.folder} has no {missing[0]}. There are"
            f" {', '.join(info.roles)}."
        )
    return list(dict.fromkeys(roles)) or list(info.roles)


class Conversation:
    """The turns of each role, and how they are shown: one role after the other, word by word."""

    def __init__(
        self, session: PolicySession, names: Sequence[str], *, seed: int, write: Callable[[str], Any]
    ):
        self.session, self.names, self.seed, self.write = session, list(names), seed, write
        self.width = max(map(len, self.names)) + 2
        self.asked = 0
        self.forget()

    def forget(self) -> None:
        self.turns: dict[str, list[dict[str, Any]]] = {name: [] for name in self.names}

    def hear(self, line: str, *, alone: bool = False) -> None:
        """Answer ``line``; with ``alone`` as the first and only one of a conversation. What cannot
        be answered is said, and the next may be."""
        if not line.strip():
            return
        if alone:
            self.write(f"> {line}\n")
        if alone or line.strip() == ANEW:
            self.forget()
        if line.strip() == ANEW:
            return
        for name in self.names:
            self.write(name.ljust(self.width))
            try:
                self._answer(name, line)
            except ValueError as error:
                self.write(f"({error})\n")
        self.write("\n")
        self.asked += 1

    def _answer(self, name: str, line: str) -> None:
        prompt, shown = self.session.info.prompt_after(self.turns[name], line)
        self.write(shown)
        (reply,) = self.session.reply(name, prompt, seed=self.seed + self.asked, write=self.write)
        self.write(f"\n{'':{self.width}}({reply.facts()})\n")
        if isinstance(prompt, list):
            self.turns[name] = [*prompt, {"role": "assistant", "content": reply.text}]


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            _to_stdout("\n")
            return
