"""Listing an S3 bucket page by page; each page is requested again on its own if that may help.

s3fs sends up to three requests about one path and follows all pages in one go. Repeated as a whole, that often fails.
"""

from __future__ import annotations

from stages.store.s3_errors import retry
from stages.store.s3_requests import S3Call


def list_names(call: S3Call, bucket: str, prefix: str, *, folders: bool = False) -> list[str]:
    """The keys that begin with the prefix, or with `folders` the next level below it: "a/b/" of the key "a/b/c" for the
    prefix "a/".
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
