"""A run that a test starts in a process of its own, kills, and starts again."""

from hf_clpeft import ContinualTrainingArguments, l2l, load_benchmark, s_lora
from hf_clpeft.training.recipe import BackboneArguments, learn


METHODS = {"s_lora": s_lora(k=5), "l2l": l2l(pool_size=4, top_n=2)}


def run(method: str, folder: str, repo_id: str | None) -> None:
    """Learns three digit tasks into a folder, or what is left of them, and pushes each, if it is told where."""
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=16)[:3]
    args = ContinualTrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        train_batch_size=16,
        disable_tqdm=True,
        resume_from_checkpoint="auto",
        save_steps=2,
        push_to_hub=repo_id is not None,
        hub_model_id=repo_id,
        hub_token="hf_alice",
    )
    learn(stream, BackboneArguments(backbone="hf-clpeft/vit-tiny-glyphs"), args, METHODS[method])
