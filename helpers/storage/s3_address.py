"""Where objects are in an S3-compatible store. Knows no client, so that settings can be turned into addresses anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class S3Address:
    """A prefix in a bucket, and how to get in. Without keys, the usual chain of AWS is asked: variables, profile, role."""

    bucket: str
    prefix: str = ""  # as a folder: "a/b"; "" is the whole bucket
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
        """What every key begins with: "a/b/", or "" for the whole bucket."""
        inside = self.prefix.strip("/")
        return f"{inside}/" if inside else ""

    def without_keys(self, text: str) -> str:
        """A text of the store's, with our keys cut out should it repeat them."""
        for secret in (self.secret_key, self.access_key):
            text = text.replace(secret, "***") if secret else text
        return text
