"""Where a model is: a directory of this machine, a folder of a bucket, or a name on the Hugging Face Hub."""

import os
import re
import sys
from pathlib import Path

from etils import epath

from llama4_jax.atomic import AnyPath, any_path, in_bucket

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.jinja", "*.safetensors", "*.pth", "tokenizer.model", "LICENSE*", "USE_POLICY.md"]


def model_directory(path: epath.PathLike) -> AnyPath:
    """The path, or, of a name as ORG/NAME that is no directory here, where the Hub's files of it are.

    They are downloaded if the package huggingface_hub is installed (`pip install "llama4-jax[hub]"`) and the Hub can be
    reached, which is said on stderr; what it has downloaded before is used as it is. Raises FileNotFoundError if they
    cannot be had, with the command that gets them.
    """
    found = any_path(path)
    name = os.fspath(path)
    if in_bucket(found) or not _NAME.fullmatch(name) or found.exists() or Path(name).parent.is_dir():
        return found
    by_hand = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"no such directory: {name}. If it is a model on the Hugging Face Hub, download it: {by_hand} "
            f'(pip install "llama4-jax[hub]" brings that command, and lets llama4-jax download by itself).'
        ) from None
    offline = constants.HF_HUB_OFFLINE
    how = "looking among what was downloaded, as HF_HUB_OFFLINE is set" if offline else "taking it from there"
    print(f"{name} is no directory here, but may be a name on the Hugging Face Hub: {how} …", file=sys.stderr)
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=["original/*"]))
    except Exception as error:  # of the Hub's client, of its connection, of the disk
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = "HF_HUB_OFFLINE is set" if offline else lines[0][:160]
        raise FileNotFoundError(
            f"no such directory: {name}; and the Hugging Face Hub did not give it ({reason}). Where there is a "
            f"network, and access to the model: {by_hand}"
        ) from error
