"""The page of ``goose-lora chat --serve``: a column a role, all asked the same."""

import copy
import html
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any

from goose_lora.apps import gradio_pages
from goose_lora.apps.session import PolicySession, Prompt, SampledReply, Turn
from goose_lora.errors import UserError

if TYPE_CHECKING:
    from gradio import Blocks

CHAT_CSS = """
.html-container { padding: 0 !important; }
.exchange { margin-bottom: 1.4rem; }
.asked { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: 0.5rem; }
.replies { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 1rem; }
.reply { border: 1px solid var(--border-color-primary); border-radius: 6px; }
.reply { padding: 0.7rem 1rem; min-height: 5rem; }
.words { margin: 0.3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.note { opacity: 0.75; font-size: 0.9rem; }
@media (max-width: 40rem) { .replies { grid-auto-flow: row; } }
"""


# ---- The conversation of a tab ----


@dataclass
class Exchange:
    """What was asked, and what stands in the box of each role.

    A box has the reply as far as it is written, and a note. ``before`` has the turns of each role
    that it came after.
    """

    line: str
    boxes: dict[str, tuple[str, str]]
    before: dict[str, list[Turn]]


class Talk:
    """One tab's conversation: the turns of each role, and what is shown of them."""

    def __init__(self, session: PolicySession, names: Sequence[str], *, seed: int):
        self.session, self.seed = session, seed
        self.turns: dict[str, list[Turn]] = {name: [] for name in names}
        self.exchanges: list[Exchange] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Talk":
        # Gradio copies what a tab begins with, and must not copy the model
        other = Talk(self.session, list(self.turns), seed=self.seed)
        other.turns, other.exchanges = copy.deepcopy(self.turns, memo), copy.deepcopy(self.exchanges, memo)
        return other

    def say(self, line: str) -> Iterator[None]:
        """Ask every role in turn; at each step there is something more to show."""
        # All boxes are there at once, and are filled one after the other
        boxes = {name: ("", "waits") for name in self.turns}
        exchange = Exchange(line, boxes, before=dict(self.turns))
        self.exchanges.append(exchange)
        seed = self.seed + len(self.exchanges) - 1
        for name, turns in self.turns.items():
            prompt, before = self.session.info.prompt_after(turns, line)
            exchange.boxes[name] = (before, "writes")
            yield
            try:
                for piece in stream(self.session, name, prompt, seed=seed):
                    if isinstance(piece, str):
                        exchange.boxes[name] = (before + piece, "writes")
                    else:
                        exchange.boxes[name] = (before + piece.text, piece.facts())
                        # Only a chat has turns: a text is continued by itself each time
                        if isinstance(prompt, list):
                            self.turns[name] = [*prompt, {"role": "assistant", "content": piece.text}]
                    yield
            except UserError as error:
                exchange.boxes[name] = (before, str(error))
                yield

    def again(self) -> Iterator[None]:
        """Ask the last question once more: its next replies take the place of those in the talk."""
        last = self.exchanges[-1]
        self.turns = dict(last.before)
        yield from self.say(last.line)


def stream(session: PolicySession, name: str, prompt: Prompt, *, seed: int) -> Iterator[str | SampledReply]:
    """Yield the text of a reply as it grows, and at its end the reply.

    What goes wrong while it is written is raised here.
    """
    pieces: Queue[str | SampledReply | BaseException] = Queue()

    def write_reply() -> None:
        try:
            pieces.put(session.reply(name, prompt, seed=seed, write=pieces.put)[0])
        except BaseException as error:  # handed to whoever waits
            pieces.put(error)

    # The model writes in a thread, so that this generator can yield in between
    threading.Thread(target=write_reply, daemon=True).start()
    # A page shows the whole text so far, not what was added
    text = ""
    while isinstance(piece := pieces.get(), str):
        text += piece
        yield text
    if isinstance(piece, BaseException):
        raise piece
    yield piece


# ---- The page ----


def build_chat_page(session: PolicySession, names: Sequence[str], *, seed: int) -> "Blocks":
    """Build the page without serving it. Each tab has a conversation of its own."""
    gradio = gradio_pages.load_gradio()

    # Words of a chat, or of texts to continue
    placeholder, ask, begin_anew = "The start of a text; each model continues it", "Go on", "Clear"
    if session.info.chat:
        placeholder, ask, begin_anew = "A message", "Ask", "New conversation"

    with gradio.Blocks(
        title=f"{', '.join(names)} of {session.info.folder}",
        analytics_enabled=False,
        fill_width=True,
    ) as page:
        # What is on it, from top to bottom
        gradio.HTML(_note(session.info.describe(names)), padding=False)
        line = gradio.Textbox(
            show_label=False,
            container=False,
            placeholder=placeholder,
            elem_id="line",
            lines=1,
        )
        with gradio.Row():
            send = gradio.Button(ask, variant="primary", elem_id="send")
            other = gradio.Button("Another sample", elem_id="again")
            anew = gradio.Button(begin_anew, elem_id="anew")
        log = gradio.HTML(elem_id="log", padding=False)
        talk = gradio.State(Talk(session, names, seed=seed))

        # What the buttons and the Enter key do
        def say(text: str, talk: Talk) -> Iterator[tuple[str, str, Talk]]:
            # The line is emptied as soon as it is asked
            if not text.strip():
                raise gradio.Error(
                    "There is nothing to answer. Write something first.", print_exception=False
                )
            for _ in talk.say(text):
                yield _log(talk.exchanges), "", talk

        said = gradio.on(
            [line.submit, send.click],
            say,
            [line, talk],
            [log, line, talk],
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )

        def say_again(talk: Talk) -> Iterator[tuple[str, Talk]]:
            if not talk.exchanges:
                raise gradio.Error("Nothing was asked yet. Write something first.", print_exception=False)
            for _ in talk.again():
                yield _log(talk.exchanges), talk

        said_again = other.click(
            say_again,
            [talk],
            [log, talk],
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
        anew.click(
            lambda: ("", "", Talk(session, names, seed=seed)),
            None,
            [log, line, talk],
            cancels=[said, said_again],
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
    return page


def _log(exchanges: Sequence[Exchange]) -> str:
    """Return the exchanges as HTML, the last one first: it stands right below the input line."""
    return "".join(_exchange(exchange) for exchange in reversed(exchanges))


def _exchange(exchange: Exchange) -> str:
    boxes = "".join(_box(name, words, note) for name, (words, note) in exchange.boxes.items())
    return (
        f'<div class="exchange"><div class="asked">{html.escape(exchange.line)}</div>'
        f'<div class="replies">{boxes}</div></div>'
    )


def _box(name: str, words: str, note: str) -> str:
    return (
        f'<div class="reply {name}"><span class="note">{name}</span>'
        f'<div class="words">{html.escape(words)}</div>{_note(note)}</div>'
    )


def _note(words: str) -> str:
    return f'<span class="note">{html.escape(words)}</span>'


def serve_chat(session: PolicySession, names: Sequence[str], *, seed: int, port: int | None) -> None:
    """Serve the page until Ctrl-C."""
    gradio_pages.serve(build_chat_page(session, names, seed=seed), port=port, css=CHAT_CSS)
