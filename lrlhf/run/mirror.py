"""A copy of a run folder in an object store, or anywhere else that fsspec reaches, for machines that come and go.

A run works in a folder on a disk, where checkpoints are renamed into place, which object stores cannot do. After each
checkpoint what has changed is copied; a machine with an empty folder begins by fetching it.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
from filelock import FileLock

from lrlhf.errors import UserError
from lrlhf.files import whole
from lrlhf.run.folder import CHECKPOINTS, OWN


class Mirror:
    """Copies of a run's files.

    Args:
        url: where, such as s3://bucket/run, gs://bucket/run or file:///mnt/run; the package that fsspec needs for it
            must be installed.

    Raises:
        UserError: a place of an unknown kind, or whose package is missing.
    """

    def __init__(self, url: str):
        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"Checkpoints.mirror={url}: {error}") from error
        self._root = root.rstrip("/")
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and time of each file when it was copied."""

    def names(self) -> list[str]:
        """Of the files there, relative to the run folder."""
        self._files.invalidate_cache()
        found = self._files.find(self._root) if self._files.exists(self._root) else []
        return [path.removeprefix(self._root).lstrip("/") for path in found]

    def checkpoints(self) -> list[str]:
        """Of `names`, those of checkpoints."""
        return [name for name in self.names() if _is_checkpoint(name)]

    def push(self, run: Path) -> None:
        """Copy what has changed, logs before checkpoints, then remove checkpoints that the run no longer keeps.

        So at every moment there is a checkpoint with logs that reach as far. A store that cannot be reached is a
        warning: the run goes on, and copies at its next checkpoint.

        Args:
            run: the run folder.
        """
        try:
            here = dict(_own_files(run))
            for name in sorted(here, key=_is_checkpoint):
                stat = here[name].stat()
                if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                    target = f"{self._root}/{name}"
                    self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(here[name]), target)
                    self._copied[name] = stat.st_size, stat.st_mtime_ns
            for name in set(self.checkpoints()) - here.keys():
                self._files.rm_file(f"{self._root}/{name}")
        except Exception as error:
            warnings.warn(f"{run} was not copied to {self.url} ({error}); it is tried again", UserWarning, stacklevel=2)

    def fetch(self, run: Path) -> None:
        """Fill a run folder that has no checkpoints, checkpoints last; one process of a machine does it for all.

        Args:
            run: the run folder; one with checkpoints of its own is left as it is.
        """
        run.mkdir(parents=True, exist_ok=True)
        with FileLock(run / ".mirror.lock"):
            if any((run / CHECKPOINTS).glob("*.ckpt")):
                return
            for name in sorted(self.names(), key=_is_checkpoint):
                with whole(run / name) as scratch:
                    self._files.get_file(f"{self._root}/{name}", str(scratch))


def _is_checkpoint(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/")


def _own_files(run: Path) -> Iterator[tuple[str, Path]]:
    """What a fit writes into its folder, by name in it; nothing that is half written."""
    for own in OWN:
        for path in [run / own, *(run / own).rglob("*")]:
            if path.is_file() and not path.name.endswith(".part"):
                yield path.relative_to(run).as_posix(), path
