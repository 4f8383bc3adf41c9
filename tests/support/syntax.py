"""What tests read off the syntax of the sources."""

import ast


def at_run_time(tree):
    """Every node of a file's syntax, but for what only type checkers read."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return (node for node in ast.walk(tree) if id(node) not in for_types)
