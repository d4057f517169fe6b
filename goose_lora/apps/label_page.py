"""The page of ``goose-lora label``: a prompt, two replies, and buttons and keys to choose with.

label.py decides which pair is shown, and keeps what is chosen.
"""

import html
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from goose_lora.apps import gradio_pages
from goose_lora.apps.label import Choose, LabelQueue, Pair, open_queue
from goose_lora.apps.session import Prompt
from goose_lora.errors import UserError

if TYPE_CHECKING:
    from gradio import Accordion, Blocks, Button, Textbox

# A tab is a labeler: its name lives as long as the tab does, reloads included.
WHO = """() => {
  let name = sessionStorage.getItem("labeler");
  if (!name) { name = crypto.randomUUID(); sessionStorage.setItem("labeler", name); }
  return [name];
}"""
# 1, 2, arrows, 0, t and s press the buttons, unless someone is writing.
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
# What the page says after each choice.
SAID = {
    "left": "Kept: 1 is better.",
    "right": "Kept: 2 is better.",
    "tie": "Kept: no difference.",
    "skip": "Skipped.",
}
# Where two people were shown one prompt.
MEANWHILE = "That prompt had been labelled meanwhile, so this choice was not written. Here is the next."


def label(
    policy: str,
    prompts: str,
    out: str,
    *,
    port: int | None = None,
    choose: Choose = "random",
    candidates: int = 4,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    base: str | None = None,
) -> None:
    """Load ``policy`` and serve the page until Ctrl-C; arguments as for ``open_queue``.

    Raises:
        UserError: there is no gradio, the port is taken, or what ``open_queue`` raises; before
            anything is loaded.
    """
    gradio_pages.require(port)
    queue = open_queue(
        policy,
        prompts,
        out,
        choose=choose,
        candidates=candidates,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        base=base,
    )
    page = build_label_page(queue, title=f"Labelling {policy}")
    gradio_pages.serve(page, port=port, css=LABEL_CSS, head=KEYS)


def build_label_page(queue: LabelQueue, *, title: str) -> "Blocks":
    """Build the page without serving it."""
    gradio = gradio_pages.load_gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        # What is on it, from top to bottom. Who labels and which pair it is are hidden texts
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
        edit_parts = [part for edit in edits for part in edit[:2]]
        shown = [key, progress, prompt, replies, choosing, others, editing, said, *edit_parts]

        # What it shows: each function returns a value for each part of ``shown``
        def show(labeler: str, words: str = "") -> list[object]:
            pair = queue.next(labeler)
            counts = _progress(queue.progress(), title, str(queue.file.path), done=pair is None)
            return _values(gradio, pair, counts, words)

        def choose(choice: str, *, edited: bool = False) -> Callable[..., list[object]]:
            def record(labeler: str, key: str, better: str = "") -> list[object]:
                words = SAID[choice]
                if edited:
                    words = "Kept: your text is better."
                try:
                    kept = queue.record(labeler, key, choice, better if edited else None)
                except UserError as error:
                    raise gradio.Error(str(error), print_exception=False) from error
                if not kept:
                    words = MEANWHILE
                return show(labeler, words)

            return record

        def on(
            event: Callable[..., object],
            function: Callable[..., list[object]],
            *inputs: object,
            js: str | None = None,
        ) -> None:
            event(
                function,
                list(inputs),
                shown,
                js=js,
                concurrency_limit=None,
                api_visibility="private",
                show_progress_on=replies,
            )

        # When it does so: as a tab opens, and at each button
        on(page.load, show, who, js=WHO)
        page.load(None, None, [who], js=WHO, api_visibility="private")
        for button, choice in ((left, "left"), (right, "right"), (tie, "tie"), (skip, "skip")):
            on(button.click, choose(choice), who, key)
        for (_, better, save), choice in zip(edits, ("left", "right"), strict=True):
            on(save.click, choose(choice, edited=True), who, key, better)
    return page


def _edit(gradio: ModuleType, side: str, number: int) -> "tuple[Accordion, Textbox, Button]":
    """Return the part in which a reply is edited, closed at first: itself, its text, its button."""
    with gradio.Accordion(f"Write a better one, from {number}", open=False, elem_id=f"{side}-edit") as part:
        better = gradio.Textbox(show_label=False, container=False, lines=4, elem_id=f"{side}-better")
        save = gradio.Button("Keep this text as the better reply", elem_id=f"{side}-save")
    return part, better, save


def _values(gradio: ModuleType, pair: Pair | None, counts: str, words: str) -> list[object]:
    """Return what each part of the page has for ``pair``; without one, nothing to choose."""
    key = prompt = replies = ""
    texts = ["", ""]
    if pair is not None:
        texts = [reply.text.strip() for reply in (pair.left, pair.right)]
        key, prompt, replies = pair.key, _prompt(pair.prompt), _two(*texts)
    # The rows of buttons, and the parts for editing, each closed and with the reply as it is
    visible = [gradio.update(visible=pair is not None)] * 3
    edits = [value for text in texts for value in (gradio.update(open=False), text)]
    return [key, counts, prompt, replies, *visible, _note(words), *edits]


# ---- HTML ----


def _two(left: str, right: str) -> str:
    cards = "".join(f'<div class="text card">{html.escape(text)}</div>' for text in (left, right))
    return f'<div class="two">{cards}</div>'


def _prompt(prompt: Prompt) -> str:
    """Return a prompt as text, or as turns, each under its role."""
    if isinstance(prompt, str):
        text = html.escape(prompt)
    else:
        text = "\n\n".join(
            f'<span class="note">{html.escape(turn["role"])}</span>\n{html.escape(turn["content"] or "")}'
            for turn in prompt
        )
    return f'<div class="text card prompt">{text}</div>'


def _progress(counts: Mapping[str, int], title: str, path: str, *, done: bool) -> str:
    """Return title, bar and counts; ``done`` says that there is no pair to show."""
    seen, total = counts["pairs"] + counts["passed"] + counts["alike"], counts["prompts"]
    words = f"{seen} of {total} prompts: {counts['pairs']} as pairs, {counts['passed']} ties or skipped"
    if counts["alike"]:
        words += f", {counts['alike']} without two different replies"
    words += f". Choices go to {path}."
    # Those that are left may be leased to others
    if done and seen == total:
        words += " That is all. Ctrl-C in the terminal ends."
    elif done:
        words += " The rest are before someone else: reload to look again."
    width = 100 * seen / total
    return f'{_note(title)}<div class="bar"><div style="width: {width:.1f}%"></div></div>{_note(words)}'


def _note(words: str) -> str:
    return f'<span class="note">{html.escape(words)}</span>'
