"""Promises about GossipTrainer, with a tiny GPT-2 and two workers:

- it learns; nothing wraps the model; with AdamW and GossipSGD, and schedule "awc"; rates are the arguments';
- evaluation is of the workers' mean; a checkpoint's model files are the mean, and load with from_pretrained;
- a run that was stopped and resumed ends as one that was not, bit for bit;
- after train() all ranks have one model, and one rank alone may save it;
- with accumulation there is one exchange per step; every rank takes as many batches as the shortest has;
- what averages already, a replaced parameter and arguments for another optimizer are refused, and told by name;
- the page's examples run, and have at most 30 lines.
"""

import huggingface_workers as workers
import pytest
import torch
from workers import run_together

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FEW = ("AdamW", "GossipSGD awc")
MORE = ("AdamW awc", "GossipSGD")
KINDS = [*FEW, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]


def training(folder, kinds):
    calls = {"start": (workers.start,)}
    for kind in kinds:
        calls[kind] = (workers.trained, folder / kind, kind)
        calls[kind, "saved"] = (workers.saved_model, folder / kind, "checkpoint-3")
        calls[kind, "after"] = (workers.saved_model, folder / kind, "after")
        calls[kind, "half"] = (workers.trained, folder / f"{kind} half", kind, 3)
        calls[kind, "resumed"] = (workers.trained, folder / f"{kind} half", kind, None, True)
    return calls


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface")
    calls = training(folder, FEW)
    calls["accumulated"] = (workers.accumulated, folder / "accumulated")
    calls["uneven"] = (workers.uneven, folder / "uneven")
    calls["refused"] = (workers.refused, folder / "refused")
    page = folder / "page"
    page.mkdir()
    calls["pages"] = (workers.pages, page)
    return run_together(2, calls, deadline=240)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return run_together(2, training(tmp_path_factory.mktemp("more"), MORE), deadline=240)


@pytest.fixture
def runs(request, kind):
    return request.getfixturevalue("few" if kind in FEW else "more")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_workers_differ_on_the_way(runs, kind):
    for run in runs[kind]:
        assert run["wrapped"] == "GPT2LMHeadModel" and run["steps"] == 6 and run["rate"] == 1e-2
        assert max(run["distances"]) > 1e-6 and run["losses"][-1] < run["losses"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_evaluated_and_saved_is_the_mean(runs, kind):
    (a,), (b,) = (run["own"] for run in runs[kind])
    saved, loss = runs[kind, "saved"][0]
    for name, value in saved.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for run in runs[kind]:
        assert len(run["eval"]) == 2 and abs(run["eval"][0] - loss) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_after_training_all_have_one_model(runs, kind):
    first, second = (run["model"] for run in runs[kind])
    saved, loss = runs[kind, "after"][0]
    assert same(first, second) and same(first, saved)
    assert all(abs(run["again"] - loss) < 1e-5 for run in runs[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(runs, kind):
    for whole, half, resumed in zip(runs[kind], runs[kind, "half"], runs[kind, "resumed"], strict=True):
        assert half["steps"] == resumed["steps"] == 3
        assert same(whole["model"], resumed["model"]) and not same(half["model"], resumed["model"])
        assert whole["distances"][3:] == resumed["distances"] and whole["losses"][3:] == resumed["losses"][3:]


def test_accumulation_exchanges_once_per_step(few):
    for sent, plain, model, other in few["accumulated"]:
        assert sent == plain
        for name in model:
            torch.testing.assert_close(model[name], other[name], rtol=1e-4, atol=1e-6)


def test_every_rank_takes_as_many_batches_as_the_shortest_has(few):
    assert [steps for steps, _ in few["uneven"]] == [8, 8]


def test_what_is_refused(few):
    for errors in few["refused"]:
        assert "DistributedDataParallel" in errors["plain"] and "DistributedDataParallel" in errors["wrapped"]
        assert "GossipTrainer in the place of Trainer" in errors["plain"]
        assert "transformer.wte.weight is another object" in errors["replaced"]
        assert "none of the optimizer's parameters is the model's" in errors["other_model"]
        assert "is for Gossip, and the optimizer is a GossipSGD" in errors["options_of_another"]
        assert "auto_find_batch_size" in errors["batch_size"]


def test_the_pages_examples(few):
    (files, first), (_, second) = few["pages"]
    assert {"model", "run", "model.pt", "last"} <= set(files) and len(first) == 2
    for (lines, distance, model), (_, _, other) in zip(first, second, strict=True):
        assert lines <= 30 and distance < 1 and model.keys() == other.keys()
    assert same(first[0][2], second[0][2])  # Trainer's, after train()
