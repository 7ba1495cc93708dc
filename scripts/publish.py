"""Publishes a run on the Hugging Face Hub: head, controller, trees, costs, recipe, provenance, scores and a model card.

    python scripts/publish.py RUN ORG/NAME --dry-run FOLDER      # the exact folder, to look at; nothing is sent
    python scripts/publish.py RUN ORG/NAME --private             # HF_TOKEN, or `hf auth login`, with write access
    python -m mmspec.chat --ckpt hub:ORG/NAME --image picture.png --prompt "Describe it."

What may go is a list of names (mmspec/hub.py), and all of it is looked at before anything is sent: weights must be
safetensors, nothing may be a link, and no file may hold a token, this machine's name or a path of it. Paths that are
values of recipe, provenance and scores are cut to their last part; whatever else is found stops it, in one line.

Refused are a run without provenance or evaluation, and one whose evaluation changed a token without a tie (exact_match
below 1). `--anyway` publishes it, and the first lines of its card say why it would not have been.

The card is written from the run, with its scores (RUN/eval, or --scores FOLDER) and their definitions. Its `base_model`
is the target's name on the Hub; where the target is a folder of this machine, --base-model says what it is there.

All files go in one commit: they are there together or not at all. Files of an earlier publication that this run does
not have are removed in the same commit. A repository that holds something else than a published head is left alone
unless --overwrite says so (what is not on the list stays in it even then).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from eval.publish import Options, build
from mmspec.arguments import Parser, command
from mmspec.hub import explain, is_repo, listed, one_line
from mmspec.types import InputError

BARE = (".gitattributes",)
"""What the Hub itself puts into a new repository."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of train/distill.py")
    add("repo", metavar="ORG/NAME", help="repository on the Hub; made where it is not there yet")
    add("--private", action="store_true", help="make the repository private; one that is public already is refused")
    add("--dry-run", nargs="?", const="", metavar="DIR", help="write the folder (default RUN/published), send nothing")
    add("--revision", metavar="R", help="branch to commit to; made where it is not there yet (default: main)")
    add("--base-model", metavar="O/N", help="the target's name on the Hub, where the run has another one")
    add("--license", metavar="ID", help="of the head, such as apache-2.0 (default: as the target's)")
    add("--scores", type=Path, metavar="DIR", help="folder of its evaluation (default: RUN/eval)")
    add("--no-report", action="store_true", help="leave report.html out: it shows records of the benchmark")
    add("--anyway", action="store_true", help="publish what provenance or correctness gate speak against")
    add("--overwrite", action="store_true", help="publish into a repository that holds something else")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="WORD",
        help="let the scan pass this; may be given several times",
    )
    args = parser.parse_args(argv)
    if not is_repo(args.repo):
        raise InputError(f"{args.repo!r} must be ORG/NAME, a repository of the Hub")
    return args


@command("publish", interrupted="a commit is there as a whole or not at all, so run it again")
def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder and sends it."""
    args = arguments(argv)
    options = Options(
        args.repo, args.base_model, args.license, args.scores, not args.no_report, args.anyway, args.allow
    )
    if args.dry_run is not None:
        folder = Path(args.dry_run) if args.dry_run else _fresh(args.run / "published")
        names = build(args.run, folder, options)
        print(f"{folder}: {_size(folder, names)}; nothing was sent")
        return
    with tempfile.TemporaryDirectory(prefix="mmspec-publish-") as scratch:
        folder = Path(scratch) / "head"
        names = build(args.run, folder, options)
        url = send(folder, names, args.repo, args.private, args.revision, args.overwrite)
        print(f"{url}: {_size(folder, names)}")


def send(folder: Path, names: Sequence[str], repo: str, private: bool, revision: str | None, overwrite: bool) -> str:
    """Sends a folder in one commit.

    Args:
        folder: was checked.
        names: its files.
        repo: `org/name`.
        private: whether others may not see it.
        revision: branch, or None for the default one.
        overwrite: into whatever is there.

    Returns:
        The commit's address.

    Raises:
        InputError: no or a wrong token, a repository that is somebody else's or of another kind, a connection that
            failed: nothing of the folder is visible then.
    """
    api, what = HfApi(), f"{repo} was not published"
    with one_line(what):
        if constants.HF_HUB_OFFLINE:
            raise InputError("HF_HUB_OFFLINE is set; publishing needs the Hub, so unset it")
        if not get_token():
            raise InputError("there is no token; set HF_TOKEN, or log in (hf auth login), with write access")
        api.whoami()
        made = _prepare(api, repo, private, revision, overwrite)
        branch = revision or "main"
        before = api.model_info(repo, revision=branch)
        there = {sibling.rfilename for sibling in before.siblings or []}
        _check_repository(repo, there, overwrite)
        stale = sorted(name for name in there - set(names) if listed(name))
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in stale]
        try:
            done = api.create_commit(
                repo, operations, commit_message="Publish a draft head", revision=branch, parent_commit=before.sha
            )
        except Exception as error:
            # Whatever broke, what counts is whether the commit is there, and that can be asked.
            raise InputError(f"{what}: {explain(error)}; {_outcome(api, repo, branch, before.sha, made)}") from error
    return str(done.commit_url)


def _prepare(api: HfApi, repo: str, private: bool, revision: str | None, overwrite: bool) -> bool:
    """Makes repository and branch where they are missing, and looks at those that are not.

    Returns:
        Whether the repository is new.
    """
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None)
        made = True
    else:
        made = False
        if private and not info.private:
            raise InputError(
                f"{repo} is public already, but --private is asked for; change it on its page, or name another"
            )
        _check_repository(repo, {sibling.rfilename for sibling in info.siblings or []}, overwrite)
    if revision is not None:
        try:
            api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo, branch=revision)
    return made


def _check_repository(repo: str, there: set[str], overwrite: bool) -> None:
    """Refuses a repository that holds something else than a head of ours."""
    others = there - set(BARE)
    if others and "head.json" not in there and not overwrite:
        raise InputError(
            f"{repo} holds something else ({', '.join(sorted(others)[:3])}); name another one, or say --overwrite"
        )


def _outcome(api: HfApi, repo: str, branch: str, before: str | None, made: bool) -> str:
    """What the Hub has after a commit that failed."""
    try:
        now = api.model_info(repo, revision=branch).sha
    except Exception:
        # The same connection as before: it may be down for good.
        return "whether the commit arrived cannot be asked; it is there as a whole or not at all, so run it again"
    if now != before:
        return f"but {repo} has a new commit, {now}, which is whole; look at it"
    return f"{repo} was made and is empty, so run it again" if made else f"{repo} is as it was"


def _fresh(folder: Path) -> Path:
    """The folder, without what an earlier dry run left there."""
    if folder.is_dir():
        others = [p for p in folder.rglob("*") if not p.is_dir() and not listed(p.relative_to(folder).as_posix())]
        if others:
            raise InputError(f"{folder} holds {others[0].name}, which is not of a dry run; name another one")
        shutil.rmtree(folder)
    return folder


def _size(folder: Path, names: Sequence[str]) -> str:
    return f"{len(names)} files, {sum((folder / name).stat().st_size for name in names) / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
