"""A bucket in memory that stands in for Google's."""

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Names begin with that of the bucket, not with a slash; nothing can be appended."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]  # not those of all memory

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def glob(self, path, **kwargs):
        return [name.lstrip("/") for name in super().glob(path, **kwargs)]

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode, "an object cannot be appended to"
        return super()._open(path, mode=mode, **kwargs)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def uploaded(directory, bucket):
    for file in directory.iterdir():
        if file.is_file():
            write(bucket / file.name, file.read_bytes())
    return bucket
