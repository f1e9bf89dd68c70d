"""Two models of different people in one: experts of both, one router, classes merged by name; nothing is trained.

python recipes/tutorials/combine_two.py me/birds you/butterflies me/garden
"""

from hf_clpeft import combine
from hf_clpeft.cli.run import run_program


def main(first: str, second: str, repo_id: str, backbone: str | None = None):
    both = combine([first, second], backbone=backbone)
    for task in both.config.tasks:
        print(f"{task.name}: {task.title}, from {task.source}")
    both.push_to_hub(repo_id)
    print(f"next: hf-clpeft demo {repo_id}")


if __name__ == "__main__":
    run_program(main)
