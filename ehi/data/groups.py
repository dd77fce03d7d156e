"""Connected components: which items are linked, directly or through others."""

from collections.abc import Iterable


def connected_components(num_items: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """Find the smallest member of each item's component.

    Args:
        num_items: items are numbered 0 to `num_items` - 1.
        links: pairs of items that are directly linked.
    """
    parent = list(range(num_items))

    def root(item):
        while parent[item] != item:
            parent[item] = parent[parent[item]]  # shortens the path for later walks
            item = parent[item]
        return item

    for one, other in links:
        one, other = root(one), root(other)
        parent[max(one, other)] = min(one, other)
    return [root(item) for item in range(num_items)]
