"""The names of phases change nothing of the program: they cost nothing when nobody takes a trace."""

import contextlib
import dataclasses
import re

import jax
import pytest
from cases import MODEL, Case

from moejax.profiling.phases import PHASES, phase_of
from moejax.train.step import make_train_step

CASE = Case(4, 2, 2, model=dataclasses.replace(MODEL, num_layers=2))


def lowered():
    program = dataclasses.replace(CASE.program)  # nothing that was traced before is taken again
    return make_train_step(program).lower()


def phases(program):
    """Those that the names of its operations say."""
    names = re.findall(r'loc\("([^"]*)"', program.as_text(debug_info=True))
    return set(filter(None, (phase_of(name) for name in names if ".py" not in name)))


@pytest.mark.full
def test_the_program_is_the_same_without_the_names_of_phases(monkeypatch):
    """What the compiler is given differs in the places that are noted for humans, and in those alone."""
    named = lowered()
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    unnamed = lowered()
    assert named.as_text() == unnamed.as_text()
    assert phases(named) == set(PHASES)
    assert phases(unnamed) == set()
