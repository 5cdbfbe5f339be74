"""Uploading a folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lrlhf.errors import UserError
from lrlhf.model.pretrained import first_line


def check_token(name: str) -> None:
    """Refuse, before anything is made, an upload that cannot succeed.

    Args:
        name: ORG/NAME of the model.

    Raises:
        UserError: the name is none, or there is no token.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push-to-hub {name}: give ORG/NAME, such as my-name/my-model.")
    if get_token() is None:
        raise UserError(f"--push-to-hub {name} needs a token of the hub: run hf auth login, or set HF_TOKEN.")


def push(folder: Path, name: str) -> None:
    """Make the model on the hub, if there is none, and upload a folder as one commit.

    Args:
        folder: to upload.
        name: ORG/NAME of the model.

    Raises:
        UserError: the hub refuses or does not answer; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        url = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of lrlhf: {folder.name}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{folder} is written, and was not uploaded to {name} ({first_line(error)}).") from error
    print(f"Uploaded: {url}")
