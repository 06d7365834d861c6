"""YAML that would cost its reader more than it is long: nested without end, or with references that multiply."""

from __future__ import annotations

from autoencoder.config import ConfigError

DEEPEST = 32  # more than any configuration; the parser's own limit is the end of the process


def check_nesting(text: str) -> None:
    """Raise ConfigError for YAML that is nested too deeply or refers to a part within a part; yaml.YAMLError for what is not YAML."""
    import yaml

    depth, anchored = 0, 0  # within an anchored part: the depth at which it began
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise ConfigError("it is nested too deeply")
            anchored = anchored or (depth if event.anchor else 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored = 0 if anchored == depth else anchored
            depth -= 1
        elif isinstance(event, yaml.AliasEvent) and anchored:
            raise ConfigError(f"*{event.anchor} stands within a part that is referred to as well: write it out")
