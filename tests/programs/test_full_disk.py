"""Every writer on a disk that is full at ten different moments."""

import os
import resource
import shutil

import own_process
import pytest
from all_writers import RULES, WRITERS
from small_llama import params_of

import cage_jax as cage

MOMENTS = 10


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_nothing_is_left_and_what_was_there_is_kept(tmp_path):
    """A limit on the size of a file stands for a disk without room."""
    own_process.run(write_more_than_fits, tmp_path)


def write_more_than_fits(folder):
    codes = cage.quantize(params_of(), RULES)
    for name, write in WRITERS.items():
        place = folder / name
        write(codes, place / "a")
        # Orbax divides arrays into other files each time.
        most = max(map(len, contents(place).values())) // (2 if name == "orbax" else 1)
        for moment in range(MOMENTS):
            before = contents(place)
            path = place / "ab"[moment % 2]  # an old one, or none
            with (
                room_for(most * moment // MOMENTS),
                pytest.raises(OSError, match=r"nothing is left of it: .*[ab]"),
            ):
                write(codes, path, overwrite=True)
            assert contents(place) == before, (name, moment)
            assert len(os.listdir(place)) == 1, (name, moment)
        write(codes, place / "a", overwrite=True)  # with room again
        shutil.rmtree(place)


class room_for:
    """Limits the size of files in a block."""

    def __init__(self, size):
        self.size, self.before = size, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
