"""How often a run reads numbers from its device, which then stands still: a fixed number a rollout
and a microbatch, whatever their size and the model's."""

import pytest
import tiny
import waits
from tiny_runs import trainer

SMALL = {"depth": 3, "response_length": 6, "per_device_train_batch_size": 4}
LARGER = {
    "tokens": {"response_length": 12},
    "rows": {"per_device_train_batch_size": 8},
    "layers": {"depth": 6},
}


def counted(folder, *, depth, lora_layers="all", train_layers="all", **changes):
    """Reads of the third rollout's generation, of its scoring, and of that of its microbatches for
    which there are most: transformers asks less of one without padding."""
    shared = tiny.shared(
        tiny.base(num_hidden_layers=depth),
        layers=lora_layers,
        critic="adapter",
        reference="copy",
        train_layers=train_layers,
    )
    tiny.randomise(shared, "default", std=0.0)
    run = trainer(
        folder,
        shared=shared,
        train_layers=train_layers,
        num_rollouts=3,
        local_rollout_forward_batch_size=64,
        score_normalization="none",
        stop_token_ids=[tiny.VOCABULARY - 1],
        **changes,
    )
    calls = {}

    def counting(owner, name):
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            with waits.Waits() as found:
                result = plain(*args, **kwargs)
            calls.setdefault(name, []).append(found)
            return result

        setattr(owner, name, call)

    for owner, name in (
        (run.collector, "generate"),
        (run, "make_experience"),
        (run.updater, "next_microbatch"),
        (run.updater, "learn"),
    ):
        counting(owner, name)
    run.train()
    learned = calls["learn"][2 * len(calls["learn"]) // 3 :]
    most = max(learned, key=lambda one: (one.ours.total(), one.others.total()))
    return {name: found[-1] for name, found in calls.items()} | {"learn": most}


@pytest.fixture(scope="module", params=["all", "top-2"])
def small(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return request.param, counted(folder, train_layers=request.param, **SMALL)


@pytest.mark.parametrize("what", LARGER)
def test_reads_do_not_grow(what, small, tmp_path):
    train_layers, fewest = small
    more = counted(tmp_path, train_layers=train_layers, **(SMALL | LARGER[what]))
    assert set(more) == {"generate", "make_experience", "next_microbatch", "learn"}
    for part, found in more.items():
        assert found.ours == fewest[part].ours, part
        if part != "generate":  # where transformers asks at each token whether all have ended
            assert found.others == fewest[part].others, part


def test_there_are_few(small):
    parts = {part: found.ours.total() for part, found in small[1].items()}
    assert parts["generate"] <= 2
    assert parts["make_experience"] <= 32
    assert parts["learn"] <= 3


def test_the_counter_sees_what_waits(tmp_path):
    import torch

    x = torch.arange(4.0)
    with waits.Waits() as found:
        x.tolist(), x.sum().item(), bool(x.any()), x[x > 1], torch.equal(x, x), x.nonzero(), x.cpu()
    assert found.others.total() == 7 and not found.ours
