"""The page of ``goose-lora chat --serve``: a column a role, all asked the same."""

import copy
import html
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

from goose_lora.apps import gradio_pages
from goose_lora.apps.session import PolicySession, Prompt, SampledReply

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


@dataclass
class Exchange:
    """What was asked, and for each role what stands in its box: the reply as far as it is written,
    and a note."""

    line: str
    boxes: dict[str, tuple[str, str]]


def stream(session: PolicySession, name: str, prompt: Prompt, *, seed: int) -> Iterator[str | SampledReply]:
    """The text of a reply as it grows, and at its end the reply. What goes wrong while it is
    written is raised here."""
    pieces: Queue[str | SampledReply | BaseException] = Queue()

    def ask() -> None:
        try:
            pieces.put(session.reply(name, prompt, seed=seed, write=pieces.put)[0])
        except BaseException as error:  # handed to whoever waits
            pieces.put(error)

    threading.Thread(target=ask, daemon=True).start()
    text = ""
    while isinstance(piece := pieces.get(), str):
        text += piece
        yield text
    if isinstance(piece, BaseException):
        raise piece
    yield piece


def build_chat_page(session: PolicySession, names: Sequence[str], *, seed: int) -> Any:
    """The page, not served yet. Its conversation is the tab's own."""
    gradio = gradio_pages.load_gradio()
    chat = session.info.chat
    with gradio.Blocks(
        title=f"{', '.join(names)} of {session.info.folder}", analytics_enabled=False, fill_width=True
    ) as page:
        gradio.HTML(f'<span class="note">{html.escape(session.info.describe(names))}</span>', padding=False)
        placeholder = "A message" if chat else "The beginning of a text, which they go on from"
        line = gradio.Textbox(
            show_label=False, container=False, placeholder=placeholder, elem_id="line", lines=1
        )
        with gradio.Row():
            send = gradio.Button("Ask" if chat else "Go on", variant="primary", elem_id="send")
            anew = gradio.Button("New conversation" if chat else "Clear", elem_id="anew")
        log = gradio.HTML(elem_id="log", padding=False)
        talk = gradio.State(Talk(session, names, seed=seed))

        def say(text: str, talk: Talk) -> Iterator[tuple[str, str, Talk]]:
            if not text.strip():
                raise gradio.Error(
                    "There is nothing to answer. Write something first.", print_exception=False
                )
            for _ in talk.say(text):
                yield _log(talk.exchanges), "", talk

        how = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        said = gradio.on([line.submit, send.click], say, [line, talk], [log, line, talk], **how)
        anew.click(
            lambda: ("", "", Talk(session, names, seed=seed)), None, [log, line, talk], cancels=[said], **how
        )
    return page


class Talk:
    """One tab's conversation: the turns of each role, and what is shown of them."""

    def __init__(self, session: PolicySession, names: Sequence[str], *, seed: int):
        self.session, self.seed = session, seed
        self.turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.exchanges: list[Exchange] = []

    def __deepcopy__(self, memo: Any) -> "Talk":
        # Gradio copies what a tab begins with, and must not copy the model
        other = Talk(self.session, list(self.turns), seed=self.seed)
        other.turns, other.exchanges = copy.deepcopy(self.turns, memo), copy.deepcopy(self.exchanges, memo)
        return other

    def say(self, line: str) -> Iterator[None]:
        """Ask every role in turn; something more can be shown at each step."""
        exchange = Exchange(line, {name: ("", "waits") for name in self.turns})
        self.exchanges.append(exchange)
        for name, turns in self.turns.items():
            prompt, before = self.session.info.prompt_after(turns, line)
            exchange.boxes[name] = (before, "writes")
            yield
            try:
                for piece in stream(self.session, name, prompt, seed=self.seed + len(self.exchanges) - 1):
                    if isinstance(piece, str):
                        exchange.boxes[name] = (before + piece, "writes")
                    else:
                        exchange.boxes[name] = (before + piece.text, piece.facts())
                        if isinstance(prompt, list):
                            self.turns[name] = [*prompt, {"role": "assistant", "content": piece.text}]
                    yield
            except ValueError as error:
                exchange.boxes[name] = (before, str(error))
                yield


def _log(exchanges: Sequence[Exchange]) -> str:
    """The last first, so that it stands below the line that is written in."""

    def box(name: str, words: str, note: str) -> str:
        words, note = html.escape(words), html.escape(note)
        return (
            f'<div class="reply {name}"><span class="note">{name}</span><div class="words">{words}</div><span'
            f' class="note">{note}</span></div>'
        )

    return "".join(
        f'<div class="exchange"><div class="asked">{html.escape(exchange.line)}</div><div'
        f' class="replies">{"".join(box(name, *shown) for name, shown in exchange.boxes.items())}</div></div>'
        for exchange in reversed(exchanges)
    )


def serve_chat(session: PolicySession, names: Sequence[str], *, seed: int, port: int | None) -> None:
    """Serve the page until Ctrl-C."""
    gradio_pages.serve(build_chat_page(session, names, seed=seed), port=port, css=CHAT_CSS)
