"""The address of objects in an S3-compatible store. It imports no S3 client, so it costs nothing to use in settings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class S3Address:
    """A prefix in a bucket, and the credentials. Without keys, AWS's usual chain is used: environment variables, profile, role."""

    bucket: str
    prefix: str = ""  # like a folder: "a/b"; "" is the whole bucket
    endpoint: str | None = None  # None is AWS
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """For messages."""
        place = f"s3://{self.bucket}/{self.folder}"
        return f"{place} at {self.endpoint}" if self.endpoint else place

    @property
    def folder(self) -> str:
        """The start of every key: "a/b/", or "" for the whole bucket."""
        inside = self.prefix.strip("/")
        return f"{inside}/" if inside else ""

    def without_keys(self, text: str) -> str:
        """A text from the store, with our credentials replaced by *** if it repeats them."""
        for secret in (self.secret_key, self.access_key):
            text = text.replace(secret, "***") if secret else text
        return text
