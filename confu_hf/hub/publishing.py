"""A saved pair onto the Hub: all of its files in one commit, and a card without figures where the repository has none."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers.utils import CONFIG_NAME

from ..configuration_confu import ConFuConfig
from .card import CardContent, pair_card

CARD = "README.md"
# What an earlier pair may have left behind: in the same commit, what the new one does not have goes.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter/*"]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload draft, adapter and options",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload what [`write_pair`] wrote, in one commit: whoever loads it gets all of one pair.

    Args:
        folder: gets a card if neither it nor the repository has one.
        **rest: as in `PreTrainedModel.push_to_hub`; a `revision` that does not exist is made.
    """
    folder, api = Path(folder), HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (folder / CARD).exists() and not api.file_exists(repo_id, CARD, revision=revision):
        config = ConFuConfig.from_json_file(folder / CONFIG_NAME)
        (folder / CARD).write_text(pair_card(config, repo_id, CardContent(tags=tags or ())), encoding="utf-8")
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=REPLACED,
    )
