"""A run for programs that people use: a folder for Ollama, or a GGUF file by llama.cpp's converter.

Both begin with the merged model. What a program needs beside the weights, the form of a chat and
the tokens that end a reply, is read from the run's tokenizer, and compared with what its template
renders.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goose_lora.data.tokenization import apply_template
from goose_lora.errors import TimeLimitError, UserError
from goose_lora.files import read_json_object
from goose_lora.models.folders import local_folder, read_lineage
from goose_lora.ownership import claim
from goose_lora.sharing.merge import merge

CONVERTER = "convert_hf_to_gguf.py"
Messages = list[dict[str, str]]


class ChatForm(NamedTuple):
    """What stands before and after the messages of each role, and what begins a reply."""

    system: tuple[str, str] | None  # None: the template has no place for it
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str  # of the reply to come
    default_system: str | None = None  # what the template says where nobody has

    def render(self, messages: Messages) -> str:
        """Return the prompt of a conversation that ends with the user, without BOS."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        parts = []
        for message in messages:
            before, after = cast(tuple[str, str], around[message["role"]])
            parts += [before, message["content"], after]
        return "".join([*parts, self.begin])


def export(
    run: str | Path, out: str | Path, *, to: str, prompts: str | None = None, base: str | None = None
) -> str:
    """Write ``run`` for another program into ``out``; return what was written, as text.

    Args:
        to: ``ollama``: merged safetensors and a Modelfile; ``gguf``: one file besides, where
            llama.cpp's converter is on the machine.
        prompts, base: as of ``merge``.

    Raises:
        UserError: as ``merge``, no converter, or a chat template that Ollama's form cannot say.
    """
    # What can be known before a weight is read
    out, folder = Path(out), local_folder(run)
    if to == "gguf":
        converter = find_converter()
        return f"{merge(run, out, prompts=prompts, base=base)}\n{_to_gguf(converter, out)}"
    form = None
    if (folder / "tokenizer_config.json").is_file():
        form = chat_form(AutoTokenizer.from_pretrained(folder))
    said = merge(run, out, prompts=prompts, base=base)

    # Beside the merged weights, whose tokenizer and ends are those of the run
    tokenizer = AutoTokenizer.from_pretrained(out)
    form = form or chat_form(tokenizer)
    ends = read_json_object(out / "generation_config.json").get("eos_token_id", [])
    text = modelfile(
        tokenizer,
        form,
        ends if isinstance(ends, list) else [ends],
        read_lineage(folder).get("settings", {}).get("temperature"),
    )
    claim(out, "Modelfile")
    (out / "Modelfile").write_text(text, encoding="utf-8")
    if form is not None and form.system is None:
        said += "\nIts form of a chat has no place for a system message: one is left out."
    name = folder.resolve().name
    return f"{said}\nLoad it: ollama create {name} --file {out / 'Modelfile'} && ollama run {name}"


# ---- Ollama ----


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    form: ChatForm | None,
    ends: Sequence[int],
    temperature: float | None = None,
) -> str:
    """Return a Modelfile for the weights beside it.

    Args:
        form: of a chat, from ``chat_form``; None for a model of plain text.
        ends: tokens at which a reply ends.
        temperature: at which replies were sampled in training; 1 if None.
    """
    template = "{{ .Prompt }}" if form is None else _go_template(form)
    lines = ["FROM .", f'TEMPLATE """{template}"""']
    if form is not None and form.default_system is not None:
        lines.append(f'SYSTEM """{form.default_system}"""')
    for end in ends:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.decode([end]), ensure_ascii=False)}")
    lines.append(f"PARAMETER temperature {1.0 if temperature is None else temperature:g}")
    return "\n".join(lines) + "\n"


def _go_template(form: ChatForm) -> str:
    """Return the form of a chat in the language of Ollama's templates."""
    roles = [("system", form.system), ("user", form.user), ("assistant", form.assistant)]
    branches = [
        f'if eq .Role "{role}" }}}}{around[0]}{{{{ .Content }}}}{around[1]}{{{{ '
        for role, around in roles
        if around is not None
    ]
    return "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}" + form.begin


def chat_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
    """Find what a chat template puts around messages, and check it on conversations.

    None where the tokenizer has no template.

    Raises:
        UserError: the template does something else than put text around each message.
    """
    if tokenizer.chat_template is None:
        return None
    # Texts that no template has
    system, user, reply, more = "\u2460s\u2460", "\u2461u\u2461", "\u2462a\u2462", "\u2463v\u2463"
    turns = [_said("user", user), _said("assistant", reply), _said("user", more)]
    refusal = UserError(
        "the chat template does more than to put text around each message, which Ollama's templates cannot"
        " say. Serve the merged model with vLLM or transformers, which read the template itself (goose-lora"
        " merge RUN --out DIR)."
    )
    without = _rendered(tokenizer, turns)
    if without is None or not all(without.count(text) == 1 for text in (user, reply, more)):
        raise refusal
    begin, rest = without.split(user)
    between, rest = rest.split(reply)
    after_reply, end = rest.split(more)
    # A reply to come begins as those that were, but for a space in front of their text
    if not between.startswith(end):
        raise refusal

    # A system message, where the template has a place for it
    with_system = _rendered(tokenizer, [_said("system", system), *turns])
    form = None
    if with_system is not None and with_system.count(system) == 1 and user in with_system:
        before, rest = with_system.split(system)
        form = _with_system(tokenizer, before, rest.split(user)[0], begin, (between, end), after_reply)
    if form is None and after_reply.endswith(begin):
        form = _form(None, begin, (between, end), after_reply.removesuffix(begin), tokenizer)
    if form is None or not _agrees(form, tokenizer):
        raise refusal
    return form


def _with_system(
    tokenizer: PreTrainedTokenizerBase,
    before: str,
    after: str,
    begin: str,
    between: tuple[str, str],
    after_reply: str,
) -> ChatForm | None:
    """Return a form with a system message, or None if the template has none of its own."""
    # Behind the message stand its end and the beginning of the user's: cut behind the first token
    # that is no text, and the line break that may follow
    cut = _behind_token(after, tokenizer)
    if cut == 0:
        return None
    system, user = (before, after[:cut]), after[cut:]
    if not user or not begin.endswith(user) or not after_reply.endswith(user):
        return None
    # Before the first user's message stands nothing, or what the template says by itself
    spoken = begin.removesuffix(user)
    default = None
    if spoken:
        if not (spoken.startswith(system[0]) and spoken.endswith(system[1])):
            return None
        default = spoken.removeprefix(system[0]).removesuffix(system[1])
        # Programs take an empty message for none, and would leave out what stands around it
        if not default:
            return None
    return _form(system, user, between, after_reply.removesuffix(user), tokenizer, default)


def _form(
    system: tuple[str, str] | None,
    user: str,
    between: tuple[str, str],
    after_reply: str,
    tokenizer: PreTrainedTokenizerBase,
    default: str | None = None,
) -> ChatForm:
    """Cut what stands behind a user's message into its end and the beginning of the reply.

    Args:
        between: up to a reply that was, and up to the one to come.
    """
    cut = _behind_token(between[1], tokenizer)
    # A template that closes no message of the user has one token, which begins the reply
    if cut >= len(between[1]):
        cut = 0
    return ChatForm(
        system,
        (user, between[0][:cut]),
        (between[0][cut:], after_reply),
        between[1][cut:],
        default,
    )


def _behind_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the first token that is no text ends, with line breaks; 0 if there is none."""
    added = cast(PreTrainedTokenizerFast, tokenizer).get_added_vocab()
    tokens = {*tokenizer.all_special_tokens, *added}
    cut = min((text.find(token) + len(token) for token in tokens if token in text), default=0)
    return cut and len(text) - len(text[cut:].lstrip("\n"))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """Return a prompt by the template, without a BOS that the tokenizer adds; None if refused."""
    try:
        text = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=True)
    except TimeLimitError:
        raise
    except Exception:  # templates raise what they like
        return None
    # Programs put BOS before a prompt where the tokenizer does it by itself
    begins = cast(list[int], tokenizer("a")["input_ids"])[0]
    if tokenizer.bos_token is not None and begins == tokenizer.bos_token_id:
        return str(text).removeprefix(str(tokenizer.bos_token))
    return str(text)


def _agrees(form: ChatForm, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the form says what the template says, for conversations of several kinds."""
    user, reply = _said("user", "What is it?\nSay."), _said("assistant", "A goose.")
    conversations = [[user], [user, reply, user], [user, reply, user, reply, user]]
    if form.system is not None:
        conversations += [[_said("system", "Be brief."), *turns] for turns in conversations]
    return all(form.render(turns) == _rendered(tokenizer, turns) for turns in conversations)


# ---- GGUF ----


def find_converter() -> Path:
    """Return llama.cpp's converter: in ``LLAMA_CPP``, its folder, or on the path.

    Raises:
        UserError: it is in neither.
    """
    folder = os.environ.get("LLAMA_CPP")
    found = shutil.which(CONVERTER)
    if folder and (Path(folder) / CONVERTER).is_file():
        return Path(folder) / CONVERTER
    if found:
        return Path(found)
    raise UserError(
        f"--to gguf needs llama.cpp's {CONVERTER}, which is not on the path. Clone"
        " https://github.com/ggml-org/llama.cpp, install its requirements, and set LLAMA_CPP to its folder."
    )


def _to_gguf(converter: Path, out: Path) -> str:
    """Run the converter on merged weights; return what it has written, as text."""
    file = out / "model.gguf"
    claim(out, file.name)
    done = subprocess.run(
        [sys.executable, str(converter), str(out), "--outfile", str(file), "--outtype", "auto"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not file.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(
            f"{converter} ended with exit code {done.returncode}: {last[0]} The merged model is in {out}."
        )
    return f"Load it: llama-cli --model {file} --jinja"
