"""Documents from data sets of the Hugging Face hub, where one can be reached (HF_ENDPOINT names a mirror; the library
honours it)."""

import errno
from collections.abc import Iterator

from finback.config import InputError
from finback.data.sources import Document, parquet_documents

_TIMEOUT = 20.0  # seconds for the first answer


def hub_documents(repo_id: str, *, column: str = "text", subset: str = "", revision: str | None = None) -> Iterator[Document]:
    """Documents of a data set's Parquet files, in the order of their names.

    `subset` keeps only files whose path contains it ("train", "wikitext-103"). Files come one at a time and stay in
    the hub library's own cache. Needs the extras `hub` and `data`. Raises InputError in one sentence when the hub
    cannot be reached, the data set or revision does not exist or is closed, or no Parquet file fits.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise InputError("getting data sets from the Hugging Face hub needs huggingface-hub; install finback[hub]") from None
    # HTTPError is the base class of whichever HTTP library this version of the hub library uses.
    unreachable = (
        errors.HTTPError,  # type: ignore[attr-defined]
        errors.OfflineModeIsEnabled,
        errors.HFValidationError,
        OSError,
    )
    try:
        siblings = huggingface_hub.HfApi().dataset_info(repo_id, revision=revision, timeout=_TIMEOUT).siblings or []
        names = sorted(file.rfilename for file in siblings if file.rfilename.endswith(".parquet") and subset in file.rfilename)
        if not names:
            raise InputError(
                f"the data set {repo_id} has no Parquet file{f' with {subset!r} in its path' if subset else ''}; "
                "many sets have a converted copy under the revision refs/convert/parquet"
            )
        for name in names:
            file = huggingface_hub.hf_hub_download(repo_id, name, repo_type="dataset", revision=revision)
            for document in parquet_documents(file, column):
                yield Document(document.text, repo_id)
    except unreachable as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise  # a full disk is no fault of the network's
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise InputError(
            f"could not get the data set {repo_id} from the Hugging Face hub ({reason}); check its name and the "
            "network, or set HF_ENDPOINT to a mirror that can be reached"
        ) from None
