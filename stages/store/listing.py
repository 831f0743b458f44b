"""What lies in an S3 bucket, page by page, each asked for again on its own if that may help.

s3fs asks up to three things about one path and follows all pages in one go; tried again as a whole, that often fails.
"""

from __future__ import annotations

from collections.abc import Callable

from stages.store.s3_errors import retry


def list_names(call: Callable[..., dict], bucket: str, prefix: str, *, folders: bool = False) -> list[str]:
    """The keys that begin so, or with `folders` what is next below: "a/b/" of the key "a/b/c" for the prefix "a/".

    call: an S3 operation by name, with its parameters.
    """
    asked, found = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/" if folders else ""}, []
    while True:
        page = retry(call, "list_objects_v2", **asked)
        if folders:
            found += [each["Prefix"] for each in page.get("CommonPrefixes", [])]
        else:  # without the empty objects by which consoles show a folder
            found += [each["Key"] for each in page.get("Contents", []) if not each["Key"].endswith("/")]
        if not page.get("IsTruncated"):
            return found
        asked["ContinuationToken"] = page["NextContinuationToken"]
