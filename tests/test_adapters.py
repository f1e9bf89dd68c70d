"""Adapters of users and strangers: what rewrites the backbone, hangs or takes memory is refused in time."""

import json
import resource
import time

import pytest
import torch
from peft import PeftType
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_clpeft import Backbone, ConfigError, ContinualModel, Expert, ExpertBank, ExpertError, s_lora, s_x
from hf_clpeft.config import ContinualConfig
from hf_clpeft.config.adapters import TECHNIQUES, Rule, check_peft, ways_to_match
from hf_clpeft.experts.expert import make_peft_config
from hf_clpeft.experts.naming import migrate_adapter
from hf_clpeft.methods.method import Batch


pytestmark = pytest.mark.usefixtures("shallow")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OPTIONS = {  # what a technique needs on layers as small as these
    "ADALORA": {"init_r": 2, "target_r": 1, "total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["layernorm"]},
    "MISS": {"r": 1, "init_weights": "bat"},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "ROAD": {"group_size": 8},
    "VBLORA": {"r": 1, "num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 12},
}
WITHOUT_RANK = {"BEFT", "BOFT"}
TAKES_THE_BACKBONE = [
    {"bias": "all"},
    {"bias": "lora_only"},
    *({"init_lora_weights": how} for how in ("pissa", "pissa_niter_16", "olora", "corda", "eva", "loftq", "lora_ga")),
    {"modules_to_save": ["layernorm"]},
    {"layer_replication": [[0, 1], [0, 2]]},
    {"target_parameters": ["layers.0.attention.q_proj.weight"]},
    {"trainable_token_indices": [1]},
    {"loftq_config": {"loftq_bits": 4}},
    {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "bias": "all"},
    {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "bias": "oft_only"},
    {"peft_type": "DELORA", "bias": "delora_only"},
]


@pytest.fixture
def small(backbone):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**size, image_size=32, patch_size=16), add_pooling_layer=False)
    return Backbone(model, backbone.processor, backbone.config)


def learn(bank, name, arguments, seed=0):
    torch.manual_seed(seed)
    peft_model = bank.start(name, make_peft_config(arguments, bank.backbone))
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        peft_model(pixel_values=IMAGES).last_hidden_state[:, 0, ::2].sum().backward()
        optimizer.step()
    return bank.finish(name)


@torch.no_grad()
def features(bank, index):
    return bank(IMAGES, torch.full((len(IMAGES),), index))


@pytest.fixture
def adapter(small, tmp_path):
    """A saved LoRA adapter, and how to change its configuration."""
    learn(ExpertBank(small), "task-000", {"peft_type": "LORA", "r": 2}).save(tmp_path / "adapter")

    def change(**values):
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return tmp_path / "adapter"

    return change


def add_tensors(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path)


@pytest.mark.parametrize("technique", [kind.value for kind in PeftType])
def test_a_technique_changes_nothing_old_and_loads_to_the_bit_or_is_refused(technique, small, tmp_path):
    rank = {} if technique in WITHOUT_RANK else {"r": 2}
    arguments = {"peft_type": technique, **OPTIONS.get(technique, rank)}
    if technique not in TECHNIQUES:
        with pytest.raises(ConfigError, match=f"{technique} .*Choose"):
            s_x(arguments)
        return
    weights = {key: tensor.clone() for key, tensor in small.model.state_dict().items()}
    bank = ExpertBank(small)
    frozen = bank.frozen(IMAGES)
    learn(bank, "a", arguments, seed=1).save(tmp_path / "a")
    before = features(bank, 0)
    assert not torch.equal(before, frozen)
    learn(bank, "b", arguments, seed=2)
    assert torch.equal(features(bank, 0), before) and torch.equal(bank.frozen(IMAGES), frozen)
    bank.abandon()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in small.model.state_dict().items())

    again = ExpertBank(small)
    torch.manual_seed(3)
    again.extend([Expert.load("a", tmp_path / "a")])
    assert torch.equal(features(again, 0), before)


@pytest.mark.parametrize("options", TAKES_THE_BACKBONE, ids=str)
def test_what_rewrites_the_backbone_is_refused_in_methods_and_in_files(options, adapter, small, tmp_path):
    arguments = {"peft_type": "LORA", "r": 1, **options}
    with pytest.raises(ConfigError, match=f"{list(options)[-1]}=.* (backbone|words|outside of layers)"):
        s_x(arguments)
    with pytest.raises(ExpertError, match=f"{list(options)[-1]}="):
        make_peft_config(arguments, small)
    if "modules_to_save" in options:
        add_tensors(adapter(), **{"base_model.model.layernorm.weight": torch.ones(16)})
    for load in (lambda folder: Expert.load("x", folder), lambda f: migrate_adapter(f, tmp_path / "new", small)):
        with pytest.raises(ExpertError, match=f"adapter_config.json cannot be used: {list(options)[-1]}="):
            load(adapter(**options))


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_a_backbone_that_changes_all_the_same_is_noticed_before_training(options, small, monkeypatch):
    monkeypatch.setitem(TECHNIQUES, "LORA", dict.fromkeys(TECHNIQUES["LORA"], Rule("anything", lambda value: True)))
    config = make_peft_config({"peft_type": "LORA", "r": 1, **options}, small)
    with pytest.raises(ExpertError, match="(LORA adapter|peft of 'a') changes .* of the frozen backbone"):
        ExpertBank(small).start("a", config)


def test_norms_and_dropout_of_the_backbone_stay_in_evaluation_mode_while_an_expert_trains(backbone):
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    convnet = Backbone(model, backbone.processor, backbone.config)
    model = ContinualModel(convnet, ContinualConfig(s_lora(lora={"lora_dropout": 0.5}), convnet.config))
    model.start_task("a", ["p", "q"])
    slot, method = model.bank.slot, model.method.train()
    method.loss(Batch(IMAGES, torch.tensor([0, 1, 0])))
    trained = {type(module).__name__ for module in method.modules() if module.training}
    assert "Dropout" in trained and not trained & {"BatchNorm2d", "ResNetModel"}
    model.bank.finish("a")  # would say that the statistics of the norms have changed
    assert not any(module.training for module in slot.eval().modules())


def test_a_backbone_that_training_changes_is_noticed_when_the_task_ends(small):
    bank = ExpertBank(small)
    bank.start("a", make_peft_config({"peft_type": "LORA", "r": 1}, small))
    small.model.layernorm.weight.data[3] *= 1.5
    with pytest.raises(ExpertError, match="Training 'a' changes layernorm.weight of the frozen backbone"):
        bank.finish("a")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 200_000},
        {"r": 0},
        {"r": -3},
        {"r": True},
        {"r": 2.0},
        {"r": "2"},
        {"r": 10**30},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 1e38},
        {"lora_alpha": "8"},
        {"lora_dropout": 1.5},
        {"rank_pattern": {"q_proj": 10**6}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {f"layer{i}": 1 for i in range(2000)}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"init_lora_weights": "pissa_niter_1000000000"},
        {"target_modules": [f"layer{i}" for i in range(100_000)]},
        {"target_modules": ["x" * 10**6]},
        {"target_modules": [["q_proj"]]},
        {"target_modules": {"q_proj": 1}},
        {"layers_to_transform": list(range(10**5))},
        {"layers_to_transform": 10**12},
        {"eva_config": {"rho": 1.0}},
        {"peft_type": ["LORA"]},
        {"peft_type": "X" * 10_000},
    ],
    ids=lambda options: str(options)[:40],
)
def test_values_out_of_bounds_are_refused_in_methods_and_in_files(options, adapter):
    arguments = {"peft_type": "LORA", "r": 1, **options}
    with pytest.raises(ConfigError) as told:
        s_x(arguments)
    assert len(str(told.value)) < 600 and "\n" not in str(told.value)
    with pytest.raises(ExpertError, match=r"adapter_config.json cannot be used"):
        Expert.load("x", adapter(**options))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*x",
        "(a+)+$",
        "(a|a)*b",
        "([a-z.]+)+!",
        "(?:.*.*)+x",
        "a?" * 30 + "a" * 30,
        ".*" * 12 + "x",
        "(q|q)" * 30,
        r"(a)\1",
        "(?=a)*",
        "(",
        "x{1000000}",
        "[a-z",
    ],
)
def test_a_pattern_that_can_take_for_ever_is_refused_at_once(field, pattern, adapter):
    began = time.perf_counter()
    with pytest.raises(ExpertError, match="pattern"):
        Expert.load("x", adapter(**{field: {pattern: 4} if field == "rank_pattern" else pattern}))
    with pytest.raises(ConfigError, match="pattern"):
        s_lora(lora={field: {pattern: 4} if field == "rank_pattern" else pattern})
    assert time.perf_counter() - began < 1


def test_many_patterns_are_refused_where_one_is_fine():
    assert check_peft({"peft_type": "LORA", "rank_pattern": {".*a.*b": 1}})
    with pytest.raises(ConfigError, match="too many, or could match in too many ways"):
        check_peft({"peft_type": "LORA", "rank_pattern": {f".*{i}.*b": 1 for i in range(100)}})


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        "q_proj",
        ".*attention.*",
        r"layers\.[01]\..*(q|v)_proj",
        r"(vit\.)?encoder\.layer\.\d+\.attention\.(query|value)",
        r"^layers\.\d{1,2}\.mlp\.fc[12]$",
        r".*\.(?:0|1|2|3)\.attention\.[^.]+_proj",
    ],
)
def test_patterns_that_people_write_are_fine(pattern):
    assert ways_to_match(pattern) < 1_000_000


def test_a_pattern_of_a_user_is_kept_through_saving_and_loading(small, tmp_path):
    arguments = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": r"layers\.1\..*(q|v)_proj",
        "alpha_pattern": {"q_.*": 4},
    }
    assert s_x(arguments).peft == arguments
    bank = ExpertBank(small)
    learn(bank, "a", arguments).save(tmp_path)
    loaded = Expert.load("a", tmp_path)
    assert loaded.config.target_modules == arguments["target_modules"] and len(loaded.tensors) == 4
    expected = features(bank, 0)
    bank.abandon()
    again = ExpertBank(small)
    again.extend([loaded])
    assert torch.equal(features(again, 0), expected)


def test_no_memory_is_taken_for_ranks_that_the_tensors_do_not_have(adapter, small):
    folder = adapter(r=4096, target_modules="all-linear", rank_pattern={"fc[12]": 4000})
    add_tensors(folder, **{"base_model.model.layers.0.mlp.fc1.lora_A.weight": torch.zeros(4096, 1)})
    width, layers = 1024, 2  # where it matters: 300 MB
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": width}
    with torch.device("meta"):
        wide = ViTModel(ViTConfig(**size, image_size=32, patch_size=16), add_pooling_layer=False)
    big = Backbone(wide, small.processor, small.config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ExpertError, match="unexpected keys .* missing keys|has shape .* and should have"):
        Expert.load("x", folder).check_fits(big)
    for options in ({"r": 1000}, {"r": 3}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}):
        with pytest.raises(ExpertError, match="'x' does not fit the backbone: .* (unexpected keys|should have)"):
            ExpertBank(small).extend([Expert.load("x", adapter(**{"rank_pattern": {}, **options}))])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_tensors_of_another_kind_are_refused_by_their_file(adapter):
    path = adapter() / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    for dtype, name in ((torch.int64, "I64"), (torch.complex64, "C64"), (torch.bool, "BOOL"), (torch.uint8, "U8")):
        save_file({**tensors, key: tensors[key].to(dtype)}, path)
        with pytest.raises(ExpertError, match=f"adapter_model.safetensors has {name} in {key}; an expert"):
            Expert.load("x", path.parent)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({**tensors, key: tensors[key].to(dtype)}, path)
        assert Expert.load("x", path.parent).tensors[key].dtype == dtype


def test_places_outside_of_a_layer_are_refused(small, tmp_path):
    bank = ExpertBank(small)
    learn(bank, "a", {"peft_type": "SHIRA", "r": 1}).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    bank.abandon()
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("shira_indices"))
    for spoil in (lambda places: places + 16, lambda places: -places - 1, lambda places: places[:1]):
        save_file({**tensors, key: spoil(tensors[key])}, path)
        with pytest.raises(ExpertError, match="shira_indices is out of range for a layer of shape"):
            ExpertBank(small).extend([Expert.load("a", tmp_path)])


def test_a_file_that_is_no_experts_is_refused_before_it_is_read(adapter, monkeypatch):
    folder = adapter()
    monkeypatch.setattr("hf_clpeft.experts.expert.LARGEST_FILE", 100)
    with pytest.raises(ExpertError, match="bytes; the limit is 100"):
        Expert.load("x", folder)
    monkeypatch.undo()
    monkeypatch.setattr("hf_clpeft.experts.expert.MOST_TENSORS", 3)
    with pytest.raises(ExpertError, match="8 tensors, or one with too long a name"):
        Expert.load("x", folder)


def test_what_says_nothing_is_left_out_whichever_peft_wrote_it(adapter):
    folder = adapter(enable_lora=None, merge_weights=False, of_the_future={}, runtime_config={"a": 1}, use_bdlora=None)
    assert Expert.load("x", folder).config.r == 2
    # The classifier that an adapter was trained with, and that did not come along.
    assert Expert.load("x", adapter(modules_to_save=["classifier"])).config.modules_to_save is None
    with pytest.raises(ExpertError, match="of_the_future=3 is no option of LORA"):
        Expert.load("x", adapter(of_the_future=3))


def test_a_misspelt_option_is_told_with_the_nearest(small):
    with pytest.raises(ConfigError, match="lora_alhpa=8 is no option of LORA .* Do you mean lora_alpha"):
        s_lora(lora={"lora_alhpa": 8})
    with pytest.raises(ConfigError, match="Do you mean LOHA"):
        s_x({"peft_type": "LOHAA", "r": 1})
    with pytest.raises(ConfigError, match="r=-3 must be a whole number from 1 to 4,096"):
        s_lora(r=-3)
