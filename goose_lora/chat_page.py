"""The page of ``goose-lora chat --serve``: a column a role, all asked the same."""

import html
import threading
from collections.abc import Iterator, Sequence
from queue import Queue
from typing import Any

from goose_lora import pages
from goose_lora.voices import Prompt, Reply, Voices

CSS = ".facts { color: var(--body-text-color-subdued); font-size: 0.85rem; min-height: 1.3rem; }"


def stream(voices: Voices, name: str, prompt: Prompt, *, seed: int) -> Iterator[str | Reply]:
    """The text of a reply as it grows, and at its end the reply. What goes wrong while it is written is raised here."""
    pieces: Queue[str | Reply | BaseException] = Queue()

    def ask() -> None:
        try:
            pieces.put(voices.ask(name, prompt, seed=seed, write=pieces.put)[0])
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


def build(voices: Voices, names: Sequence[str], *, seed: int) -> Any:
    """The page, not served yet. Its conversation is the tab's own."""
    gradio = pages.load_gradio()
    chat = voices.found.chat
    title = f"{', '.join(names)} of {voices.found.folder}"
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(f'<span class="facts">{html.escape(voices.found.describe(names))}</span>')
        with gradio.Row():
            columns = [_column(gradio, name) for name in names]
        line = gradio.Textbox(
            show_label=False, placeholder="A message" if chat else "A beginning, which is gone on from", elem_id="line", autofocus=True, lines=1
        )
        with gradio.Row():
            send = gradio.Button("Ask" if chat else "Go on", variant="primary", elem_id="send")
            anew = gradio.Button("New conversation" if chat else "Clear", elem_id="anew")
        turns, count = gradio.State({name: [] for name in names}), gradio.State(0)
        shown = [*(part for column in columns for part in column), turns, count, line]

        def say(text: str, turns: dict[str, list[Any]], count: int, *logs: list[Any]) -> Iterator[list[Any]]:
            if not text.strip():
                raise gradio.Error("There is nothing to answer. Write something first.", print_exception=False)
            logs = tuple([*log, {"role": "user", "content": text}] for log in logs)
            facts = [""] * len(names)
            turns = dict(turns)

            def state() -> list[Any]:
                return [*(part for log, fact in zip(logs, facts, strict=True) for part in (log, _facts(fact))), turns, count + 1, ""]

            for column, name in enumerate(names):
                prompt, before = voices.found.asked(turns[name], text)
                logs[column].append({"role": "assistant", "content": before})
                facts[column] = "writes"
                try:
                    for piece in stream(voices, name, prompt, seed=seed + count):
                        words = piece if isinstance(piece, str) else piece.text
                        logs[column][-1] = {"role": "assistant", "content": before + words}
                        if isinstance(piece, Reply):
                            facts[column] = piece.facts()
                            turns[name] = [*prompt, {"role": "assistant", "content": words}] if isinstance(prompt, list) else []
                        yield state()
                except ValueError as error:
                    raise gradio.Error(str(error), print_exception=False) from error

        def forget() -> list[Any]:
            return [*([], "") * len(names), {name: [] for name in names}, 0, ""]

        how = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        for event in (line.submit, send.click):
            event(say, [line, turns, count, *(log for log, _ in columns)], shown, **how)
        anew.click(forget, None, shown, **how)
    return page


def _column(gradio: Any, name: str) -> tuple[Any, Any]:
    with gradio.Column():
        log = gradio.Chatbot(
            label=name, elem_id=f"log-{name}", height="60vh", render_markdown=False, buttons=["copy"], feedback_options=None, placeholder=""
        )
        return log, gradio.HTML(elem_id=f"facts-{name}")


def _facts(words: str) -> str:
    return f'<div class="facts">{html.escape(words)}</div>'


def serve_chat(voices: Voices, names: Sequence[str], *, seed: int, port: int | None) -> None:
    """Serve the page until Ctrl-C."""
    pages.serve(build(voices, names, seed=seed), port=port, css=CSS)
