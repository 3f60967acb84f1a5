"""A backup of a folder that is copied while it is being pushed to, in the order that docs/operations.md gives."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from registry import cli
from tests.registry.conftest import configured, served
from tests.registry.kits import tar_of, whole_kit
from tests.registry.wire import OCI_MANIFEST, Wire, descriptor, encode, image

Choice = Callable[[Path], bool]


def is_tag(path: Path) -> bool:
    return "_tags" in path.parts


def is_manifest(path: Path) -> bool:
    return "_manifests" in path.parts


def is_content(path: Path) -> bool:
    return path.parts[0] == "blobs"


def is_other(path: Path) -> bool:
    is_under_way = path.parts[:2] in {("_store", "uploads"), ("_store", "tmp")}
    return not (is_tag(path) or is_manifest(path) or is_content(path) or is_under_way)


# The four lines of the manual: what names another thing before what it names.
ORDER: list[Choice] = [is_tag, is_manifest, is_other, is_content]


def copy(source: Path, target: Path, choice: Choice) -> None:
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if path.is_file() and choice(place):
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            (target / place).unlink(missing_ok=True)
            shutil.copy2(path, target / place)


async def push_something(wire: Wire, number: int) -> None:
    """A new repository with a tag, a referrer, and another tag of one that is there."""
    kit = whole_kit("gzip")
    kit.add("dataset", "more", tar_of({f"more/{number}.bin": bytes([number])}), name="more")
    digest = await kit.push(wire, f"team/kit-{number}")
    await kit.push(wire, "team/kit", f"v{number}")
    await wire.push_blob(f"team/kit-{number}", b"{}")
    signature = image(
        subject=descriptor(encode(kit.manifest), OCI_MANIFEST), artifactType="example/signature", layers=[]
    )
    assert signature["subject"]["digest"] == digest
    await wire.push_manifest(f"team/kit-{number}", "signed", signature)


async def back_up(source: Path, target: Path, order: list[Choice]) -> None:
    """Something is pushed before each step, and after the last."""
    async with served(configured({"filesystem": {"rootdirectory": str(source)}})) as url:
        for number, choice in enumerate(order):
            await push_something(Wire(url), number)
            await asyncio.to_thread(copy, source, target, choice)
        await push_something(Wire(url), len(order))


def fsck(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["fsck", "--storage", str(folder)])
    return result.exit_code, result.output


async def test_a_copy_that_takes_what_names_before_what_is_named_is_whole(tmp_path: Path) -> None:
    await back_up(tmp_path / "store", tmp_path / "backup", ORDER)

    status, said = await asyncio.to_thread(fsck, tmp_path / "backup")

    assert status == 0, said
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path / "backup")}})) as url:
        assert (await Wire(url)("GET", "/v2/team/kit/manifests/v0")).status == 200


async def test_the_same_copy_can_be_brought_up_to_date(tmp_path: Path) -> None:
    await back_up(tmp_path / "store", tmp_path / "backup", ORDER)
    await back_up(tmp_path / "store", tmp_path / "backup", ORDER)

    status, said = await asyncio.to_thread(fsck, tmp_path / "backup")

    assert status == 0, said


async def test_content_first_lacks_what_was_pushed_meanwhile_and_fsck_says_so(tmp_path: Path) -> None:
    content_first: list[Choice] = [is_content, is_manifest, is_tag, is_other]
    await back_up(tmp_path / "store", tmp_path / "backup", content_first)

    status, said = await asyncio.to_thread(fsck, tmp_path / "backup")

    assert status == 1
    assert "link-dangling" in said
