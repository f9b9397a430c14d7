"""What methods ask for by name, and who finds it."""

from alphaq.measuring.probes import PROBES
from alphaq.planning.passes import PASSES
from alphaq.sensitivity.methods import METHODS

ALWAYS = {"errors", "alpha", "places"}
OF_TEXT = {"outputs"}


def test_every_need_of_a_method_is_met() -> None:
    needs = {need for method in METHODS.values() for need in method.needs}
    assert needs == ALWAYS | OF_TEXT | PASSES.keys() | PROBES.keys()
    assert not PASSES.keys() & PROBES.keys()
    assert all("text" in method.needs for method in METHODS.values() if OF_TEXT & {*method.needs})
