"Where a function of the package is known by its name: the modules in which a test has to replace it."
import sys


def everywhere(name: str, function) -> list:
    "All modules of the package that have imported a function, and the one that defines it."
    modules = [m for n, m in sorted(sys.modules.items()) if n.startswith("copd_nb.") and m is not None]
    found = [m for m in modules if vars(m).get(name) is function]
    if not found: raise LookupError(f"no module of copd_nb has {name}")
    return found
