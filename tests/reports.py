"""Figures that tests collect and print, which assertions alone would hide."""


def collect(request, lines):
    """Yields a dict for a fixture to hand out, and prints `lines(dict)` when the fixture's scope ends.

    Nothing is printed for an empty dict, nor by the workers of `-n 2`, which have no terminal.
    """
    found = {}
    yield found
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if not found or capture is None:
        return
    with capture.global_and_fixture_disabled():
        print("", *lines(found), sep="\n")
