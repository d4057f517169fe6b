"""The page of ``goose-lora label``: a prompt, two replies, and buttons and keys to choose with.
What is shown and kept is label.py's."""

import html
from collections.abc import Mapping
from typing import Any

from goose_lora.apps import gradio_pages
from goose_lora.apps.label import Choose, LabelQueue, open_queue
from goose_lora.apps.session import Prompt

# A tab is a labeler: its name lives as long as the tab does, reloads included.
WHO = """() => {
  let name = sessionStorage.getItem("labeler");
  if (!name) { name = crypto.randomUUID(); sessionStorage.setItem("labeler", name); }
  return [name];
}"""
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, textarea")) return;
  const left = {"1": "left", "ArrowLeft": "left"}, right = {"2": "right", "ArrowRight": "right"};
  const neither = {"0": "tie", "t": "tie", "s": "skip"};
  const chosen = {...left, ...right, ...neither}[event.key];
  const button = chosen && document.querySelector("button#" + chosen);
  if (!button) return;
  event.preventDefault();
  if (!button.disabled) button.click();
});
</script>"""
LABEL_CSS = """
.html-container { padding: 0 !important; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.card { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 0.8rem 1rem; }
.prompt { background: var(--background-fill-secondary); }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.two .card { min-height: 5rem; }
.two .card::before { content: "1"; display: block; opacity: 0.75; font-size: 0.9rem; }
.two .card + .card::before { content: "2"; }
.note { opacity: 0.75; font-size: 0.9rem; }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); }
.bar { overflow: hidden; margin: 0.4rem 0; }
.bar div { height: 100%; background: #4a7a4f; }
@media (max-width: 40rem) { .two { grid-template-columns: 1fr; } }
"""
SAID = {
    "left": "Kept: 1 is better.",
    "right": "Kept: 2 is better.",
    "tie": "Kept: no difference.",
    "skip": "Skipped.",
}
MEANWHILE = "That prompt had been labelled meanwhile, so this choice was not written. Here is the next."


def label(
    policy: str, prompts: str, out: str, *, port: int | None = None, choose: Choose = "random", **options: Any
) -> None:
    """Load ``policy`` and serve the page until Ctrl-C; ``options`` as for ``open_queue``.

    Raises:
        ValueError: no gradio, a port that is taken, and what ``open_queue`` raises; before anything
            is loaded.
    """
    gradio_pages.require(port)
    queue = open_queue(policy, prompts, out, choose=choose, **options)
    gradio_pages.serve(
        build_label_page(queue, title=f"Labelling {policy}"), port=port, css=LABEL_CSS, head=KEYS
    )


def build_label_page(queue: LabelQueue, *, title: str) -> Any:
    """The page, not served yet."""
    gradio = gradio_pages.load_gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        who, key = (gradio.Textbox(visible="hidden", elem_id=name) for name in ("who", "key"))
        progress, prompt, replies = (
            gradio.HTML(elem_id=name, padding=False) for name in ("progress", "prompt", "replies")
        )
        with gradio.Row() as choosing:
            left = gradio.Button("1 is better (1 or ←)", variant="primary", elem_id="left")
            right = gradio.Button("2 is better (2 or →)", variant="primary", elem_id="right")
        with gradio.Row() as others:
            tie = gradio.Button("No difference (0)", elem_id="tie")
            skip = gradio.Button("Skip this prompt (s)", elem_id="skip")
        with gradio.Row() as editing:
            edits = [_edit(gradio, side, number) for number, side in enumerate(("left", "right"), 1)]
        said = gradio.HTML(elem_id="said", padding=False)
        shown = [
            key,
            progress,
            prompt,
            replies,
            choosing,
            others,
            editing,
            said,
            *(part for edit in edits for part in edit[:2]),
        ]

        def show(labeler: str, words: str = "") -> list[Any]:
            pair = queue.next(labeler)
            counts = _progress(queue.progress(), title, str(queue.file.path), done=pair is None)
            visible = [gradio.update(visible=pair is not None)] * 3
            if pair is None:
                return ["", counts, "", "", *visible, _note(words), *[gradio.update(open=False), ""] * 2]
            texts = [reply.text.strip() for reply in (pair.left, pair.right)]
            parts = [part for text in texts for part in (gradio.update(open=False), text)]
            return [pair.key, counts, _prompt(pair.prompt), _two(*texts), *visible, _note(words), *parts]

        def choose(choice: str, *, edited: bool = False) -> Any:
            def record(labeler: str, key: str, better: str = "") -> list[Any]:
                try:
                    kept = queue.record(labeler, key, choice, better if edited else None)
                except ValueError as error:
                    raise gradio.Error(str(error), print_exception=False) from error
                said = "Kept: your text is better." if edited else SAID[choice]
                return show(labeler, said if kept else MEANWHILE)

            return record

        how = {"concurrency_limit": None, "api_visibility": "private", "show_progress_on": replies}
        page.load(show, [who], shown, js=WHO, **how)
        page.load(None, None, [who], js=WHO, api_visibility="private")
        for button, choice in ((left, "left"), (right, "right"), (tie, "tie"), (skip, "skip")):
            button.click(choose(choice), [who, key], shown, **how)
        for (_, better, save), choice in zip(edits, ("left", "right"), strict=True):
            save.click(choose(choice, edited=True), [who, key, better], shown, **how)
    return page


def _edit(gradio: Any, side: str, number: int) -> tuple[Any, Any, Any]:
    with gradio.Accordion(f"Write a better one, from {number}", open=False, elem_id=f"{side}-edit") as part:
        better = gradio.Textbox(show_label=False, container=False, lines=4, elem_id=f"{side}-better")
        save = gradio.Button("Keep this text as the better reply", elem_id=f"{side}-save")
    return part, better, save


def _two(left: str, right: str) -> str:
    cards = "".join(f'<div class="text card">{html.escape(text)}</div>' for text in (left, right))
    return f'<div class="two">{cards}</div>'


def _prompt(prompt: Prompt) -> str:
    turns = (
        html.escape(prompt)
        if isinstance(prompt, str)
        else "\n\n".join(
            f'<span class="note">{html.escape(turn["role"])}</span>\n{html.escape(turn["content"] or "")}'
            for turn in prompt
        )
    )
    return f'<div class="text card prompt">{turns}</div>'


def _progress(counts: Mapping[str, int], title: str, path: str, *, done: bool) -> str:
    seen, total = counts["pairs"] + counts["passed"] + counts["alike"], counts["prompts"]
    alike = f", {counts['alike']} without two different replies" if counts["alike"] else ""
    words = (
        f"{seen} of {total} prompts: {counts['pairs']} as pairs, {counts['passed']} ties or skipped{alike}."
        f" Choices go to {path}."
    )
    if done:
        words += (
            " That is all. Ctrl-C in the terminal ends."
            if seen == total
            else " The rest are before someone else: reload to look again."
        )
    return (
        f'{_note(title)}<div class="bar"><div style="width:'
        f' {100 * seen / total:.1f}%"></div></div>{_note(words)}'
    )


def _note(words: str) -> str:
    return f'<span class="note">{html.escape(words)}</span>'
