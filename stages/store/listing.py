"""List an S3 bucket page by page, and retry each page on its own.

s3fs sends up to three requests about one path and follows all pages in one call. A retry of the whole call often fails.
"""

from __future__ import annotations

from stages.store.s3_errors import retry
from stages.store.s3_requests import S3Call


def list_names(call: S3Call, bucket: str, prefix: str, *, folders: bool = False) -> list[str]:
    """The keys that begin with the prefix.

    folders: return the next level of names below the prefix instead. For the prefix "a/", the key "a/b/c" gives "a/b/".
    """
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/" if folders else ""}
    names: list[str] = []
    while True:
        page = retry(call, "list_objects_v2", **request)
        if folders:
            names += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
        else:  # without the empty objects by which consoles show a folder
            names += [entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
        if not page.get("IsTruncated"):
            return names
        request["ContinuationToken"] = page["NextContinuationToken"]
