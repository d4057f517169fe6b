"""The page of ``goose-lora label``: a prompt, two replies, and buttons and keys to choose with. What is shown and kept is label.py's."""

import html
from collections.abc import Mapping
from typing import Any

from goose_lora import pages
from goose_lora.label import Choose, LabelQueue, Pair, open_queue
from goose_lora.voices import Prompt

# A tab is a labeler: its name lives as long as the tab does, reloads included.
WHO = """() => {
  let name = sessionStorage.getItem("labeler");
  if (!name) { name = crypto.randomUUID(); sessionStorage.setItem("labeler", name); }
  return [name];
}"""
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea")) return;
  const chosen = {"1": "left", "ArrowLeft": "left", "2": "right", "ArrowRight": "right", "0": "tie", "t": "tie", "s": "skip"}[event.key];
  const button = chosen && document.querySelector("button#" + chosen);
  if (!button) return;
  event.preventDefault();
  if (!button.disabled) button.click();
});
</script>"""
CSS = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.card { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 0.8rem 1rem; min-height: 5rem; }
.prompt { background: var(--background-fill-secondary); min-height: 0; }
.who { color: var(--body-text-color-subdued); font-size: 0.85rem; }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin-bottom: 0.4rem; }
.bar div { height: 100%; background: #4a7a4f; }
"""
SAID = {"left": "Kept: 1 is better.", "right": "Kept: 2 is better.", "tie": "Kept: no difference.", "skip": "Skipped."}
DONE = "There is no prompt left: all are labelled, or are before someone else just now. Reload the page to look again, or end with Ctrl-C."


def label(policy: str, prompts: str, out: str, *, port: int | None = None, choose: Choose = "random", **options: Any) -> None:
    """Load ``policy`` and serve the page until Ctrl-C; ``options`` as for ``open_queue``.

    Raises:
        ValueError: no gradio, a port that is taken, and what ``open_queue`` raises; before anything is loaded.
    """
    pages.require(port)
    queue = open_queue(policy, prompts, out, choose=choose, **options)
    pages.serve(build(queue, title=f"Labelling {policy}"), port=port, css=CSS, head=KEYS)


def build(queue: LabelQueue, *, title: str) -> Any:
    """The page, not served yet."""
    gradio = pages.load_gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        who, key = (gradio.Textbox(visible="hidden", elem_id=name) for name in ("who", "key"))
        progress = gradio.HTML(elem_id="progress")
        prompt = gradio.HTML(elem_id="prompt")
        with gradio.Row() as replies:
            sides = [_side(gradio, side, number) for side, number in (("left", 1), ("right", 2))]
        with gradio.Row() as others:
            tie = gradio.Button("No difference (0)", elem_id="tie")
            skip = gradio.Button("Skip this prompt (s)", elem_id="skip")
        said = gradio.HTML(elem_id="said")
        shown = [key, progress, prompt, replies, others, said, *(part for side in sides for part in (side["reply"], side["better"], side["edit"]))]

        def show(labeler: str, words: str = "") -> list[Any]:
            pair = queue.next(labeler)
            there = pair is not None
            visible = [gradio.update(visible=there)] * 2
            texts = (pair.left.text, pair.right.text) if pair else ("", "")
            parts = [part for text in texts for part in (_card(text), text, gradio.update(open=False))]
            return [pair.key if pair else "", _progress(queue.progress()), _prompt(pair), *visible, _note(words), *parts]

        def choose(choice: str, edited: bool) -> Any:
            def record(labeler: str, key: str, better: str = "") -> list[Any]:
                try:
                    kept = queue.record(labeler, key, choice, better if edited else None)
                except ValueError as error:
                    raise gradio.Error(str(error), print_exception=False) from error
                words = SAID[choice] if not edited else "Kept: your text is better."
                return show(labeler, words if kept else "That prompt had been labelled meanwhile, so this choice was not written. Here is the next.")

            return record

        page.load(show, [who], shown, js=WHO, api_visibility="private")
        page.load(None, None, [who], js=WHO, api_visibility="private")
        how = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        for button, choice in ((sides[0]["choose"], "left"), (sides[1]["choose"], "right"), (tie, "tie"), (skip, "skip")):
            button.click(choose(choice, False), [who, key], shown, **how)
        for side, choice in zip(sides, ("left", "right"), strict=True):
            side["save"].click(choose(choice, True), [who, key, side["better"]], shown, **how)
    return page


def _side(gradio: Any, side: str, number: int) -> dict[str, Any]:
    with gradio.Column():
        reply = gradio.HTML(elem_id=f"{side}-reply")
        choose = gradio.Button(f"{number} is better ({number} or {'←' if number == 1 else '→'})", variant="primary", elem_id=side)
        with gradio.Accordion(f"Write a better one from {number}", open=False, elem_id=f"{side}-edit") as edit:
            better = gradio.Textbox(show_label=False, lines=4, elem_id=f"{side}-better")
            save = gradio.Button("Keep this text as the better reply", elem_id=f"{side}-save")
    return {"reply": reply, "choose": choose, "edit": edit, "better": better, "save": save}


def _card(text: str) -> str:
    return f'<div class="text card">{html.escape(text)}</div>'


def _prompt(pair: Pair | None) -> str:
    return _note(DONE) if pair is None else f'<div class="text card prompt">{_turns(pair.prompt)}</div>'


def _turns(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return html.escape(prompt)
    return "\n\n".join(f'<span class="who">{html.escape(turn["role"])}</span>\n{html.escape(turn["content"] or "")}' for turn in prompt)


def _progress(counts: Mapping[str, int]) -> str:
    done, total = counts["pairs"] + counts["passed"], counts["prompts"]
    alike = f", {counts['alike']} without two different replies" if counts["alike"] else ""
    words = f"{done} of {total} prompts: {counts['pairs']} pairs, {counts['passed']} ties or skipped{alike}"
    return f'<div class="bar"><div style="width: {100 * done / total:.1f}%"></div></div><span class="who">{words}</span>'


def _note(words: str) -> str:
    return f'<span class="who">{html.escape(words)}</span>'
