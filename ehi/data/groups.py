"""Which items belong together: connected components of links."""

from collections.abc import Iterable


def connected_components(num_items: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """Smallest member of the component of every item.

    Args:
        num_items: items are numbered 0 to `num_items` - 1.
        links: pairs of items that belong together, directly.
    """
    parent = list(range(num_items))

    def root(item):
        while parent[item] != item:
            parent[item] = parent[parent[item]]  # halves the path for the next walk
            item = parent[item]
        return item

    for one, other in links:
        one, other = root(one), root(other)
        parent[max(one, other)] = min(one, other)
    return [root(item) for item in range(num_items)]
