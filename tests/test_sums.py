"""Sums of single tasks: added, removed to the bit, in a file of each task, and refused where they do not fit."""

import shutil

import pytest
import torch
from conftest import make_trainer, pattern_dataset, vouch
from safetensors.torch import load_file, save_file

from hf_clpeft import (
    METHODS,
    ConfigError,
    ContinualModel,
    TaskStream,
    combine,
    klda,
    ncm,
    ranpac,
    s_lora,
    s_lora_mix,
    slda,
    slda_pp,
)
from hf_clpeft.routing import ROUTERS, GaussianRouter
from hf_clpeft.routing.covariance import factorize


pytestmark = pytest.mark.usefixtures("shallow")
REMOVABLE = ["gaussian", "class_means", "klda"]
WIDTH = 12


def images(task, count=20, views=2):
    """Two classes of a task, one of which the next task has, too."""
    generator = torch.Generator().manual_seed(task)
    labels = torch.arange(count) % 2 + task
    centres = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(99))
    return centres[labels][:, None] + 0.3 * torch.randn(count, views, WIDTH, generator=generator), labels


def make(name, *tasks, **options):
    router = ROUTERS[name](query_size=WIDTH)
    for option, value in ({"kernel_features": 30} if name == "klda" else {} | options).items():
        setattr(router, option, value)
    for task in tasks:
        router.learn(*images(task))
    return router


def same(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", REMOVABLE)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_router_without_a_task_is_the_one_that_never_knew_it(name, position):
    router = make(name, 0, 1, 2)
    router.remove(position, {number: number for number in range(4)})
    never = make(name, *(task for task in range(3) if task != position))
    assert same(router, never)
    query = images(5)[0][:, 0]
    assert torch.equal(router(query).scores, never(query).scores)


@pytest.mark.parametrize("name", REMOVABLE)
def test_tasks_that_are_added_and_removed_leave_no_trace(name):
    router, numbers = make(name, 0, 1), {number: number for number in range(9)}
    for task in (2, 5, 7):
        router.learn(*images(task))
        router.remove(2, numbers)
    router.merge(make(name, 3), list(range(9)))
    router.remove(2, numbers)
    assert same(router, make(name, 0, 1))
    query = images(5)[0][:, 0]
    assert torch.equal(router(query).scores, make(name, 0, 1)(query).scores)


def test_what_is_left_of_the_classes_is_renumbered():
    router = make("gaussian", 0, 3)
    router.remove(0, {3: 0, 4: 1})
    assert router.classes.tolist() == [0, 1] and router.owners.tolist() == [0, 0]


@pytest.mark.parametrize("rank", [1, 3, None])
def test_a_factor_is_the_best_of_its_rank_and_keeps_all_variances(rank):
    residuals = torch.randn(30, 2, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scatter = torch.einsum("nvi,nvj->ij", residuals, residuals) / 2
    factor, rest = factorize(residuals, rank)
    values, vectors = torch.linalg.eigh(scatter)
    kept = slice(-(rank or WIDTH), None)
    torch.testing.assert_close(factor.T @ factor, vectors[:, kept] * values[kept] @ vectors[:, kept].T)
    torch.testing.assert_close((factor.T @ factor + rest.diag()).diagonal(), scatter.diagonal())
    assert torch.equal(factor, factor.triu()) and len(factor) == (rank or WIDTH)


def test_few_images_need_few_rows():
    factor, rest = factorize(torch.randn(3, 1, WIDTH, dtype=torch.float64))
    assert factor.shape == (3, WIDTH) and rest.max() < 1e-12
    assert factorize(torch.zeros(3, 1, WIDTH, dtype=torch.float64))[0].shape == (0, WIDTH)


def test_a_limited_rank_says_much_the_same():
    whole, small = make("gaussian", 0, 1, 2), make("gaussian", 0, 1, 2, covariance_rank=4)
    assert small.factors.shape == (12, WIDTH)
    query, labels = images(1, count=200)
    names = [router.class_scores(router(query[:, 0]).scores).argmax(dim=1) for router in (whole, small)]
    assert (names[0] == names[1]).float().mean() > 0.95


class Greedy(GaussianRouter):
    """Keeps more than its base knows to take away."""

    def add_sums(self, features, residuals, entries):
        super().add_sums(features, residuals, entries)
        self.more = features.sum()


def test_a_router_that_adds_more_than_it_can_take_away_cannot_forget():
    router = Greedy(WIDTH)
    router.learn(*images(0))
    assert "does not implement `remove`" in router.why_not_removed(0)
    assert make("gaussian", 0).why_not_removed(0) is None and make("klda", 0).why_not_removed(0) is None
    assert make("ridge").why_not_removed(0) is not None


# In a model


@pytest.fixture(scope="module")
def stream():
    return TaskStream.class_incremental(pattern_dataset(6), num_tasks=3)


CHOSEN = {
    "slda": slda(),
    "ncm": ncm(),
    "klda": klda(kernel_features=40),
    "s_lora": s_lora(router="gaussian"),
    "mix": s_lora_mix(mix=2, covariance_rank=4),
    "views": slda_pp(adapt=False, views=4, view_kind="crop", query_layers=[-2, -1]),
    "first": METHODS["closed_form_first"].Config(peft={"peft_type": "LORA"}),
}


@pytest.fixture(scope="module")
def learnt(stream, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in CHOSEN}
    for name, method in CHOSEN.items():
        make_trainer(method, folders[name], num_train_epochs=1).learn_stream(stream)
    return folders


def logits(model):
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixels).logits


@pytest.mark.parametrize("name", CHOSEN)
def test_unlearning_is_exact_and_deletes_a_file(name, learnt, stream, tmp_path):
    folder = shutil.copytree(learnt[name], tmp_path / "model")
    sums = sorted(path.name for path in folder.glob("sums/*"))
    assert sums == ([] if name == "ncm" else [f"task-00{i}.safetensors" for i in range(3)])
    before = {path: path.read_bytes() for path in folder.glob("sums/*")}
    model = ContinualModel.from_pretrained(folder)
    model.remove("task-002")
    model.save_pretrained(folder)
    after = {path: path.read_bytes() for path in folder.glob("sums/*")}
    assert after == {path: data for path, data in before.items() if path.stem != "task-002"}

    make_trainer(CHOSEN[name], tmp_path / "never", num_train_epochs=1).learn_stream(stream[:2])
    never = ContinualModel.from_pretrained(tmp_path / "never")
    assert torch.equal(logits(ContinualModel.from_pretrained(folder)), logits(never))


@pytest.mark.parametrize("name", ["slda", "klda", "views"])
@pytest.mark.parametrize("gone", [0, 1])
def test_what_was_learnt_after_a_task_does_not_know_that_it_was_there(name, gone, learnt, stream, tmp_path):
    model = ContinualModel.from_pretrained(learnt[name])
    model.remove(stream[gone].name)
    others = TaskStream([task for task in stream if task is not stream[gone]])
    never = make_trainer(CHOSEN[name], tmp_path / "never").learn_stream(others)
    assert never.tasks == [task.name for task in model.config.tasks]
    assert same(model.router, ContinualModel.from_pretrained(tmp_path / "never").router)


@pytest.mark.parametrize("name", ["mix", "first"])
def test_the_task_whose_expert_takes_query_features_stays(name, learnt):
    model = ContinualModel.from_pretrained(learnt[name])
    with pytest.raises(ConfigError, match="'task-000' cannot be removed exactly, as its expert takes everyone's"):
        model.remove("task-000")
    model.remove("task-001")
    assert model.config.classes == ["class 0", "class 1", "class 4", "class 5"]


def test_sums_of_all_images_cannot_be_taken_apart(stream, tmp_path):
    model = make_trainer(ranpac(projection_size=20), tmp_path).model
    make_trainer(ranpac(projection_size=20), tmp_path).learn_stream(stream)
    model = ContinualModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be removed exactly, as the sums of its router hold the images of"):
        model.remove("task-001")


@pytest.mark.parametrize("name", ["slda", "ncm", "klda", "s_lora", "views"])
def test_models_of_single_tasks_are_combined_to_the_one_that_learnt_all(name, learnt, stream, tmp_path):
    for task in stream:
        make_trainer(CHOSEN[name], tmp_path / task.name, num_train_epochs=1).learn(task)
    both = combine([tmp_path / task.name for task in stream])
    whole = ContinualModel.from_pretrained(learnt[name])
    assert both.config.classes == whole.config.classes
    assert same(both.router, whole.router)


@pytest.mark.parametrize("name", ["mix", "first", "slda"])
def test_models_that_went_on_from_the_same_one_share_its_tasks(name, learnt, stream, tmp_path):
    method = CHOSEN[name]
    make_trainer(method, tmp_path / "base", num_train_epochs=1).learn(stream[0])
    for folder, task in (("one", stream[1]), ("two", stream[2])):
        shutil.copytree(tmp_path / "base", tmp_path / folder)
        trainer = make_trainer(method, tmp_path / folder, num_train_epochs=1)
        trainer = type(trainer)(ContinualModel.from_pretrained(tmp_path / folder), trainer.args)
        trainer.learn(task)
    both = combine([tmp_path / "one", tmp_path / "two"])
    assert [task.name for task in both.config.tasks] == ["one-task-000", "one-task-001", "two-task-002"]
    assert both.config.removed == [] and both.router.num_owners == 3
    both.save_pretrained(tmp_path / "both")
    again = ContinualModel.from_pretrained(tmp_path / "both")
    assert torch.equal(logits(again), logits(both))
    if name != "slda":
        stranger = make_trainer(method, tmp_path / "other", num_train_epochs=1, seed=5)
        stranger.learn(stream[1])
        said = "their first task's expert differs, [0-9a-f]{12}… and [0-9a-f]{12}…. .*with slda_pp.adapt=False."
        with pytest.raises(ConfigError, match=said):
            combine([tmp_path / "one", tmp_path / "other"])


def test_models_that_look_at_a_picture_in_other_ways_are_not_combined(stream, tmp_path):
    ways = {
        "both": ("crop_flip", 2, 2),
        "crop": ("crop", 2, 2),
        "flip": ("flip", 2, 2),
        "four": ("crop", 4, 3),
        "plain": ("flip", 2, 1),
    }
    for name, (kind, views, seen) in {**ways, "many": ("crop", 4, 2), "one": ("crop", 4, 1)}.items():
        task = stream[name in ("crop", "plain")]
        make_trainer(slda(view_kind=kind, views=views, test_views=seen), tmp_path / name).learn(task)
    with pytest.raises(ConfigError, match="their view_kind differs, 'crop' and 'flip'.* the same --view_kind when"):
        combine([tmp_path / "crop", tmp_path / "flip"])
    with pytest.raises(ConfigError, match="their test_views differs, 2 and 3.* the same --test_views when learning"):
        combine([tmp_path / "crop", tmp_path / "four"])
    both = combine([tmp_path / "crop", tmp_path / "many"])  # sums over any number of views add up
    assert len(both.config.classes) == 4 and both.method.options.view_kind == "crop"
    assert len(combine([tmp_path / "plain", tmp_path / "one"]).config.classes) == 4  # and over any kind of them
    for pair in (["crop", "both"], ["both", "crop"]):  # a model of digits must see no mirror images of them
        assert combine([tmp_path / name for name in pair]).method.options.view_kind == "crop"
    models = [ContinualModel.from_pretrained(tmp_path / name) for name in ("crop", "flip")]
    models[1].config.method.view_kind = "crop"  # as the message says
    assert combine(models).config.classes == ["class 2", "class 3", "class 0", "class 1"]


def test_only_sums_of_the_new_task_are_sent(stream, hub):
    options = {"hub_model_id": "alice/model", "hub_token": "hf_alice", "push_to_hub": True, "num_examples": 0}
    trainer = make_trainer(slda(), "out", **options)
    trainer.learn(stream[0])
    files = hub.repo("alice/model").files()
    trainer.learn(stream[1])
    after = hub.repo("alice/model").files()
    assert after.keys() - files.keys() == {"sums/task-001.safetensors"}
    assert after["sums/task-000.safetensors"] == files["sums/task-000.safetensors"]
    assert len(after["router.safetensors"]) < 200  # nothing in it grows
    assert torch.equal(logits(ContinualModel.from_pretrained("alice/model")), logits(trainer.model))
    trainer.model.remove("task-000")
    trainer.model.push_to_hub("alice/model", token="hf_alice", squash_history=True)
    secret = files["sums/task-000.safetensors"]
    assert "sums/task-000.safetensors" not in hub.repo("alice/model").files()
    assert secret not in hub.repo("alice/model").objects.values()


@pytest.mark.parametrize(
    "key, change",
    [
        ("classes", lambda t: t + 2),
        ("classes", lambda t: t - 1),
        ("classes", lambda t: t[:0]),
        ("classes", lambda t: t[None]),
        ("counts", lambda t: -t),
        ("counts", lambda t: t[:1]),
        ("prototypes", lambda t: t[:, :-1]),
        ("factor", lambda t: t[:-1]),
        ("factor", lambda t: t[:0]),
        ("rank", lambda t: t + 1),
        ("rank", lambda t: -t),
        ("rank", lambda t: t * 0 + 2**62),
        ("rank", lambda t: t.repeat(2)),
        ("rest", lambda t: t - 1),
        ("rest", lambda t: t[:-1]),
        ("rest", lambda t: t * torch.nan),
        ("rest", None),
        ("more", lambda t: torch.ones(2)),
    ],
)
def test_sums_that_do_not_fit_are_refused(key, change, learnt, tmp_path):
    folder = shutil.copytree(learnt["slda"], tmp_path / "model")
    path = folder / "sums" / "task-001.safetensors"
    tensors = load_file(path)
    changed = None if change is None else change(tensors.get(key)).contiguous()
    tensors = {name: tensor for name, tensor in tensors.items() if name != key}
    save_file(tensors if changed is None else tensors | {key: changed}, path)
    vouch(folder)
    with pytest.raises(ConfigError, match="router.safetensors does not fit the model|not finite"):
        ContinualModel.from_pretrained(folder)


def test_a_file_of_sums_that_is_missing_or_of_nobody_is_noticed(learnt, tmp_path):
    folder = shutil.copytree(learnt["slda"], tmp_path / "model")
    shutil.copyfile(folder / "sums" / "task-001.safetensors", folder / "sums" / "task-007.safetensors")
    with pytest.raises(ConfigError, match=r"sums/task-007.safetensors, which its config.json does not know"):
        ContinualModel.from_pretrained(folder)
    (folder / "sums" / "task-007.safetensors").unlink()
    (folder / "sums" / "task-001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks the file sums/task-001.safetensors"):
        ContinualModel.from_pretrained(folder)


def pooled(*tasks):
    """As a model's file was when the sums of all tasks were one."""
    router = make("gaussian", *tasks)
    state = {**router.state_dict(), "scatter": router.sum_up().float()}
    old = make("gaussian")
    kept = {name: state[name] for name in ("prototypes", "counts", "owners", "classes", "scatter")}
    old.load(old.join(kept, [], []), len(tasks), int(state["classes"].max()) + 1)
    return old


@pytest.mark.parametrize("first, second", [("old", "old"), ("old", "new"), ("new", "old")])
def test_old_sums_are_merged_with_new_ones(first, second):
    one = pooled(0, 1) if first == "old" else make("gaussian", 0, 1)
    two = pooled(0, 1) if second == "old" else make("gaussian", 0, 1)
    one.merge(two, [3, 4, 5])
    assert one.num_owners == 4 and len(one.ranks) == (2 if (first, second) == ("old", "new") else 0)
    whole = make("gaussian", 0, 1)
    whole.merge(make("gaussian", 0, 1), [3, 4, 5])
    query = images(1)[0][:, 0]
    torch.testing.assert_close(one(query).scores, whole(query).scores, rtol=1e-3, atol=1e-3)
    assert one.calibrated() == [False, False, *([len(one.ranks) > 0] * 2)]
    assert "when the sums of all tasks were one" in one.why_not_removed(0)
    with pytest.raises(ConfigError, match="Task 1 cannot be removed exactly, as it was saved when"):
        one.remove(1, {})
    if len(one.ranks):
        one.remove(3, {number: number for number in range(6)})
        assert one.num_owners == 3 and len(one.ranks) == 1


def test_a_router_whose_sums_are_of_all_images_does_not_forget():
    router = make("linear_ridge", 0, 1)
    with pytest.raises(ConfigError, match="as the sums of its router hold the images of all tasks"):
        router.remove(0, {2: 0})


@pytest.mark.parametrize("name", ["factors", "rests", "thresholds", "ranks"])
def test_parts_of_sums_that_are_missing_are_noticed(name):
    state = make("gaussian", 0, 1).state_dict()
    state[name] = state[name][:0]
    with pytest.raises(ValueError, match=name if name != "ranks" else "factors has shape"):
        make("gaussian").load(state, 2, 3)


def test_nothing_is_written_or_deleted_behind_a_link(learnt, tmp_path):
    folder = shutil.copytree(learnt["slda"], tmp_path / "model")
    model = ContinualModel.from_pretrained(folder)
    (folder / "sums").rename(tmp_path / "elsewhere")
    (folder / "sums").symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    model.remove("task-000")
    with pytest.raises(ConfigError, match="sums is a symbolic link"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before
