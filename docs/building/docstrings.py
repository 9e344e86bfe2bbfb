"""How docstrings of this repository become pages: an extension of griffe, which reads them as text."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Attribute, Docstring, Extension, GriffeLoader, Module, Object

from docs.building.api import described

ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):`~?([\w.]+)`")


class Docstrings(Extension):
    """Sections called Example are code, roles are links, and comments beside the fields of a class describe them."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        if attr.docstring is None and attr.lineno and attr.parent is not None and attr.parent.is_class:
            _, _, comment = attr.lines[0].partition("  # ")
            if comment:
                attr.docstring = Docstring(escaped(comment), parent=attr, lineno=attr.lineno)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        mend(pkg)
        unhidden(pkg)


def mend(obj: Object) -> None:
    """Turn headings and roles in the docstrings of an object and all in it into what the site understands."""
    if obj.docstring is not None:
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = ROLE.sub(lambda role: reference(role[1], obj), text)
    for member in obj.members.values():
        if isinstance(member, Object):
            mend(member)


def unhidden(package: Module) -> None:
    """Let `from package.name import name` win over the module of that name, as it does for whoever imports it."""
    for module in list(package.modules.values()):
        if module.is_alias:
            continue
        unhidden(module)
        if module.name in (package.exports or ()) and module.name in module.members:
            package.set_member(module.name, Alias(module.name, module.members[module.name], parent=package))


def reference(name: str, obj: Object) -> str:
    """What a role in the docstring of an object names: a link, if it stands in the reference."""
    path, scope = name, obj
    if "." not in name:
        while name not in scope.members and scope.parent is not None:
            scope = scope.parent
        path = f"{scope.path}.{name}"
    known = any(path == each or path.startswith(f"{each}.") for each in described())
    return f"[`{name}`][{path}]" if known else f"`{name}`"


def escaped(comment: str) -> str:
    """A comment as Markdown: brackets and stars of shapes are no links and no emphasis."""
    return re.sub(r"([\[\]*_<>|])", r"\\\1", comment)
