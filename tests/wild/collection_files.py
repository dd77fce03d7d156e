"""Changes of a BEIR folder, and zips of it."""

import zipfile

BOM = "\ufeff"


def add_line(path, text):
    """Append a line to a file."""
    with path.open("a") as file:
        file.write(text + "\n")


def zip_of(path, entries, **options):
    """A zip of name -> bytes, written by Python as its names are given."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def files_of(folder):
    """Name relative to a folder -> bytes."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
