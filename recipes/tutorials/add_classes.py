"""A month later: new classes for a model that is on the Hub, with none of the old pictures at hand.

python recipes/tutorials/add_classes.py me/birds new/pictures october

A single class is enough. Old experts stay as they are, to the bit; the Hub gets one commit, and a tag: october.
"""

from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, load_task
from hf_clpeft.cli.run import run_program


def main(repo_id: str, pictures: str, name: str, backbone: str | None = None):
    task = load_task(pictures, name=name)
    model = ContinualModel.from_pretrained(repo_id, backbone=backbone)
    args = ContinualTrainingArguments(
        output_dir=repo_id.split("/")[-1],
        num_train_epochs=5,
        train_batch_size=16,
        push_to_hub=True,
        hub_model_id=repo_id,
    )
    ContinualTrainer(model, args).learn(task)
    print(f"It knows {', '.join(model.config.classes)}.")
    print(f"next: hf-clpeft demo {repo_id}")


if __name__ == "__main__":
    run_program(main)
