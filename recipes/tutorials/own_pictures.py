"""From a folder of pictures to a model on the Hub, in five minutes.

hf auth login
python recipes/tutorials/own_pictures.py my/pictures me/birds

The folder holds a folder for each class: my/pictures/robin/1.jpg, my/pictures/wren/2.jpg, ... A fifth of the pictures
is held out to measure how well it went. What comes next, in a month: add_classes.py.
"""

from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, load_task, slda_pp
from hf_clpeft.cli.run import run_program


def main(pictures: str, repo_id: str, backbone: str = "google/vit-base-patch16-224-in21k"):
    task = load_task(pictures, name="first")
    # Without adaptation to the first pictures, models of different people can be combined, and any task be removed.
    model = ContinualModel.from_backbone(backbone, slda_pp(adapt=False))
    args = ContinualTrainingArguments(
        output_dir=repo_id.split("/")[-1],
        num_train_epochs=5,
        train_batch_size=16,
        push_to_hub=True,
        hub_model_id=repo_id,
    )
    ContinualTrainer(model, args).learn(task)
    print(f"next: hf-clpeft demo {repo_id}")


if __name__ == "__main__":
    run_program(main)
