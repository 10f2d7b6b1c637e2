"""Where do log lines go, and what do they look like?

One line per event on standard error, for people or as JSON.
"""

from __future__ import annotations

import logging
import sys

import structlog

from serval_core.config_sections import LogSection


def set_up_logging(section: LogSection) -> None:
    """Configure structlog for the whole process."""
    # The console renderer formats exceptions itself.
    formatted = [structlog.processors.format_exc_info] if section.format == "json" else []
    time_stamp = structlog.processors.TimeStamper(fmt="iso", utc=section.format == "json")
    renderer: structlog.typing.Processor
    if section.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *formatted,
            time_stamp,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[section.level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
