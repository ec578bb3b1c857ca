"""Engines of other installed packages, found by entry points; only the one that is asked for is imported.

An entry point of the group `cobatch.engines` has the name of an engine, or a suffix of model files with its
dot, such as `.xml`, and refers to a function like those of `engines.loader.ENGINES` (docs/engines.md).
"""

from importlib.metadata import EntryPoint, entry_points

from cobatch.engines.errors import EngineLoadError

GROUP = "cobatch.engines"


def plugin_names() -> list[str]:
    """Return the names of the engines that installed packages add. It reads the metadata of all packages."""
    return sorted(name for name in entry_points(group=GROUP).names if not name.startswith("."))


def find_plugin(name: str) -> EntryPoint | None:
    """Return the entry point for an engine's name, or a suffix. Raises EngineLoadError if there are two."""
    found = list(entry_points(group=GROUP, name=name))
    if len(found) > 1:
        packages = ", ".join(sorted(map(package_of, found)))
        raise EngineLoadError(f"engine {name!r} is in several packages: {packages}; uninstall all but one")
    return found[0] if found else None


def package_of(plugin: EntryPoint) -> str:
    """Return the package and its version, for messages."""
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else plugin.module
