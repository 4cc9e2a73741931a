"""What a shell offers where an option or an argument takes one of some names; files are offered by the shell itself.

Each function gives every name; the shell's part is to keep those that begin as typed.
"""


def laws() -> list[str]:
    from mlx_forget.laws.forms import laws

    return [law.name for law in laws()]


def methods() -> list[str]:
    from mlx_forget.methods import METHODS

    return list(METHODS)


def recipes() -> list[str]:
    from mlx_forget.resources import recipe_files

    return list(recipe_files())


def backends() -> list[str]:
    from mlx_forget.backends import backend_names

    return [*backend_names(), "auto"]


def models() -> list[str]:
    from mlx_forget.ladder import SIZES

    return list(SIZES)


def corpora() -> list[str]:
    from mlx_forget.pipeline.corpora import CORPORA

    return list(CORPORA)


def sources() -> list[str]:
    from mlx_forget.pipeline.recipes import names

    return [*corpora(), *names()]


def engines() -> list[str]:
    from mlx_forget.engines import ENGINES

    return list(ENGINES)


def devices() -> list[str]:
    from mlx_forget.costs import DEVICES

    return list(DEVICES)


def statuses() -> list[str]:
    from mlx_forget.runs.selection import STATUSES

    return list(STATUSES)


def interval_methods() -> list[str]:
    from mlx_forget.laws.uncertainty import METHODS

    return list(METHODS)


def cluster_levels() -> list[str]:
    from mlx_forget.laws.clusters import AUTO, LEVELS

    return [AUTO, *LEVELS]


def purposes() -> list[str]:
    from mlx_forget.needs import NEEDS

    return [need.name for need in NEEDS]


def sinks() -> list[str]:
    from mlx_forget.training.tracking import SINKS

    return list(SINKS)


def precisions() -> list[str]:
    from typing import get_args

    from mlx_forget.specs import Precision

    return list(get_args(Precision))


# The keys of a configuration that take names of a table; those that are literals offer themselves.
OF_KEYS = {"method": methods, "backend": backends, "model": models, "target": corpora, "pretrain": corpora}
