"""Floor 3: the backbones, registered with timm when this package is imported; one file a family."""

from timm import list_models

from visionsel.models import biformer, dinat_s, focalnets, halonets, nat, selectformer

__all__ = [
    "biformer",
    "dinat_s",
    "focalnets",
    "halonets",
    "nat",
    "registered_names",
    "selectformer",
]

_FAMILIES = (biformer, dinat_s, focalnets, halonets, nat, selectformer)


def registered_names(pattern: str = "*") -> list[str]:
    """Names of the models that visionsel adds to timm and that match a wildcard pattern, without tags.

    Examples:
        >>> from visionsel.models import registered_names
        >>> registered_names("nat_*")
        ['nat_base', 'nat_mini', 'nat_small', 'nat_tiny']
    """
    ours = {name for family in _FAMILIES for name in family.__all__}
    return [name for name in list_models(pattern) if name in ours]
