"""What is asked of every picture: that each of its texts can be read."""

import itertools


def labels(fig):
    """Every text of the picture with its place, but for ticks outside of an axis' range, which are not drawn."""
    fig.canvas.draw()
    texts = [fig._suptitle]
    for ax in fig.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for location, label in ticks if low <= location <= high]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]


def check_labels(fig):
    """No text is cut off and no two overlap; returns them."""
    width, height = fig.canvas.get_width_height()
    shown = labels(fig)
    for text, place in shown:
        inside = place.x0 >= 0 and place.y0 >= 0 and place.x1 <= width and place.y1 <= height
        assert inside, f"{text!r} is cut off"
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        assert not a.overlaps(b), f"{one!r} and {other!r} overlap"
    return [text for text, _ in shown]
