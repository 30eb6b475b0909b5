"""Pictures of plans."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedft.errors import PlanError, first_line


def draw_epsilon(curves: Mapping[str, Sequence[float]], title: str, file: Path) -> None:
    """Draw ε over rounds, a step line for each label, into a PNG, SVG or PDF file.

    Args:
        curves: label to ε after each round, from round 1 on, all finite.
        title: of the picture.
        file: where it goes; the ending says which kind.

    Raises:
        PlanError: the file cannot be written, or its ending is none of these.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.step(range(len(values) + 1), [0.0, *values], where="pre", label=label)
    axes.set(title=title, xlabel="round", ylabel="ε of the most-used client")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"cannot write the picture {str(file)!r}: {first_line(error)}; name a .png, .svg or .pdf file in a folder "
            "that exists"
        ) from error
